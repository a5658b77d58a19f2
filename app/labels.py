"""What the form calls settings whose keys do not say it to everybody, and the sections."""

from __future__ import annotations

LABELS = {
    "model.family": "Kind of base model", "model.base": "Base model", "model.vae": "VAE",
    "model.text_encoder_2": "Second text encoder", "model.tokenizer_2": "Second tokenizer",
    "model.distilled": "Distilled model", "model.prediction": "What the base predicts",
    "data.folder": "Images", "data.trigger": "Trigger word", "data.crop_variants": "Random crops of each image",
    "data.caption_variants": "Shuffled orders of each caption", "data.keep_tags": "Tags that stay in front",
    "data.mask_background": "Weight outside of masks", "data.regularisation": "Regularisation images",
    "data.regularisation_share": "Share of regularisation", "data.regularisation_weight": "Weight of regularisation",
    "data.flip": "Mirror images", "data.repeats": "Repeats of each image",
    "adapter.init": "Start of the factors", "adapter.dora": "DoRA", "adapter.fuse_qkv": "Fuse q, k, v",
    "adapter.targets": "Layers", "adapter.target_pattern": "Layers by name", "adapter.diagonal": "Diagonal S",
    "adapter.scale_dim": "d of gradient scaling", "adapter.start_from": "Start from a LoRA file",
    "train.lr": "Learning rate", "train.lr_scheduler": "Course of the learning rate",
    "train.warmup_steps": "Warm-up steps", "train.up_lr_ratio": "LoRA+ ratio", "train.beta1": "Beta 1",
    "train.beta2": "Beta 2", "train.grad_accum": "Gradient accumulation", "train.max_grad_norm": "Gradient clipping",
    "train.snr_gamma": "Min-SNR gamma", "train.ema_decay": "EMA decay", "train.cautious": "Cautious weight decay",
    "memory.budget_gb": "Memory budget (GiB)", "memory.offload_blocks": "Blocks kept off the GPU",
    "memory.quantize": "Quantise the model", "memory.quantize_text_encoder": "Quantise the text encoder",
    "memory.cuda_graphs": "CUDA graphs", "memory.shard": "Model shared by GPUs",
    "sample.prompts": "Sample prompts", "sample.every": "Draw samples every … steps",
    "sample.negative": "Negative prompt", "sample.before": "Draw before training", "sample.seed": "Seed of the samples",
    "sample.steps": "Sampler steps", "sample.width": "Width of samples", "sample.height": "Height of samples",
    "evaluate.folder": "Held-out images", "evaluate.holdout": "Share held out",
    "evaluate.every": "Validate every … steps", "evaluate.images": "Images in the validation loss",
    "evaluate.quantiles": "Timesteps in the validation loss", "evaluate.distance": "Extractor for KID and FID",
    "evaluate.generate": "Images for KID and FID", "evaluate.distance_every": "Measure KID every … steps",
    "output.format": "Format of the file", "output.dtype": "Precision of the file",
    "output.save_every": "Save every … steps", "output.save_minutes": "Save every … minutes",
    "output.keep": "Checkpoints that stay", "output.weights": "Weights to export", "output.license": "Licence",
    "output.cover": "Cover picture", "output.full_paths": "Whole paths in the metadata",
    "log.every": "Log every … steps", "log.rank_every": "Effective rank every … steps",
    "log.tensorboard": "TensorBoard",
}
SECTIONS = {"model": "Base model", "data": "Images and captions", "adapter": "Adapter", "train": "Training",
            "memory": "Memory", "sample": "Samples", "evaluate": "Validation", "output": "Files", "log": "Log"}
