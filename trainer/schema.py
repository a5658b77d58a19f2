"""Every setting there is, with its limits, default and help text.

Preset files, `--set` and the app's form all come from here.

A field's `json_schema_extra` may carry `advanced` (folded away in the form), `follows` (shown, never typed),
`kind` ("path", "text": how the form draws it) and `path` ("input": made absolute when a run begins).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

SCHEMA_VERSION = 2  # `preset.MIGRATIONS` brings older presets here


def setting(default: Any, help: str, *, advanced: bool = False, kind: str = "", path: bool = False,
            follows: str = "", **limits: Any) -> Any:
    """A field of the schema: default, help text for the form, and limits as in pydantic's `Field`."""
    extra: dict[str, Any] = {"advanced": advanced}
    if kind:
        extra["kind"] = kind
    if path:
        extra |= {"kind": "path", "path": True}
    if follows:
        extra["follows"] = follows
    return Field(default, description=help, json_schema_extra=extra, **limits)


class Problem(NamedTuple):
    """One fault of a preset: where ("section.key", "section" or ""), and what is wrong in plain words."""

    where: str
    text: str


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and get_origin(annotation) is not Literal:
            raise PydanticCustomError("no_switch", "should not be true or false")
        return value


Name = Annotated[str, Field(min_length=1)]
Folders = Name | Annotated[list[Name], Field(min_length=1)]
Method = Literal["lora", "stiefel", "stella", "trilora"]
Rate = Annotated[float, Field(gt=0.0, le=10.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Quantize = Literal["auto", "none", "fp8", "int8", "nf4"]


class Model(Section):
    family: Literal["sd15", "sdxl", "flux1", "flux2"] = setting(..., "The kind of base model.")
    base: str = setting(..., "The base model: a diffusers folder, a single .safetensors file, or a hub id.",
                        path=True, min_length=1)
    vae: str = setting("", "Another VAE: folder or .safetensors file. Empty: the base's own.", path=True, advanced=True)
    text_encoder: str = setting("", "Another text encoder: folder or .safetensors file. Empty: the base's own.",
                                path=True, advanced=True)
    text_encoder_2: str = setting("", "Another second text encoder (SDXL: CLIP bigG; Flux.1: T5). Empty: the "
                                  "base's own.", path=True, advanced=True)
    tokenizer: str = setting("", "A tokenizer: folder or hub id. Empty: the base's own, else the one that ships "
                             "(CLIP, Qwen).",
                             path=True, advanced=True)
    tokenizer_2: str = setting("", "The second text encoder's tokenizer (Flux.1: T5's). Empty: as above.", path=True,
                               advanced=True)
    distilled: Literal["auto", "yes", "no"] = setting(
        "auto", "Flux.2 klein: whether it is the distilled one. auto: read from the base, as far as it says.",
        advanced=True)
    prediction: Literal["auto", "epsilon", "v_prediction"] = setting(
        "auto", "What the base predicts. auto: read from the base, as far as it says.", advanced=True)
    clip_skip: int = setting(1, "Which of CLIP's last layers feeds the model: 1 the last, 2 the one before. "
                             "SDXL counts from its own, the one before the last.",
                             advanced=True, ge=1, le=4)


class Data(Section):
    folder: Folders = setting(..., "Folder with images and their .txt captions, or a list of folders. "
                              "A folder called 5_name counts each image five times.", path=True)
    repeats: int = setting(1, "How often an epoch shows each image, on top of a folder's own number.", ge=1, le=1000)
    resolution: int = setting(512, "Side of a square image, in pixels. Images of other shapes get the same area.",
                              ge=64, le=4096, multiple_of=8)
    buckets: bool = setting(True, "Group images by aspect ratio instead of cropping all to squares.", advanced=True)
    crop: Literal["center", "random"] = setting("center", "Which part stays when an image does not fit its bucket.",
                                                advanced=True)
    crop_variants: int = setting(4, "How many random crops of each image are cached.", advanced=True, ge=1, le=64)
    flip: bool = setting(False, "Show each image mirrored half of the time. Wrong for text and lop-sided faces.")
    trigger: str = setting("", "Trigger word: put before every caption that does not already have it.")
    caption_dropout: Fraction = setting(0.0, "Share of samples trained without their caption.")
    shuffle_tags: bool = setting(False, "Shuffle comma-separated tags.")
    keep_tags: int = setting(1, "How many first tags stay in place when shuffled (the trigger word is one).",
                             advanced=True, ge=0, le=100)
    caption_variants: int = setting(8, "How many shuffled orders of each caption are cached.", advanced=True,
                                  ge=1, le=256)
    masks: Literal["off", "file", "alpha", "auto"] = setting(
        "file", "Masks, white where to learn. file: NAME-masklabel.png beside the image NAME, where there is one. "
        "alpha: the image's own transparency. auto: the file, else the alpha.", advanced=True)
    mask_background: float = setting(
        0.1, "Weight of the loss outside of a mask, against 1 inside. Each image counts as much as any other, however "
        "small its mask.", advanced=True, ge=0.0, le=1.0)
    regularisation: str | Annotated[list[Name], Field(min_length=1)] = setting(
        "", "Folder (or folders) with images of the kind that should stay as it is, such as other people for a person. "
        "They are trained on without the trigger word.", path=True, advanced=True)
    regularisation_share: Annotated[float, Field(gt=0.0, le=0.9)] = setting(
        0.5, "Share of an epoch's samples that are regularisation images; they take turns.", advanced=True)
    regularisation_weight: float = setting(1.0, "Weight of their loss, against 1 for the other images.", advanced=True,
                                           gt=0.0, le=10.0)


class Adapter(Section):
    method: Method = setting(
        "stella", "lora: plain. stiefel: B orthonormal, A free. stella: U S Vᵀ with U and V orthonormal. "
        "trilora: U S Vᵀ unconstrained, for comparison.")
    rank: int = setting(16, "Rank of the adapter: more holds more, and makes a larger file.", ge=1, le=512)
    alpha: int = setting(0, "Follows rank: the scale alpha/rank is always 1.", follows="rank")
    init: Literal["default", "pissa", "olora", "random", "zero", "pseudo-zero", "svd-major", "svd-minor"] = setting(
        "default", "How the factors start. default: the method's own. lora: pissa, olora. "
        "stella: random, zero, pseudo-zero, svd-major, svd-minor.", advanced=True)
    dora: bool = setting(False, "Add a trained magnitude per input column (DoRA). diffusers cannot read it.",
                         advanced=True)
    retraction: Literal["default", "polar", "exponential", "qr"] = setting(
        "default", "How a factor returns to the manifold. stella: polar or exponential. stiefel: qr.", advanced=True)
    targets: list[Literal["attention", "feed_forward", "projection", "convolution", "single_blocks",
                          "text_encoder", "all"]] = setting(
        ["attention"], "Which layers get an adapter. all: every group of the denoiser.", min_length=1)
    fuse_qkv: bool = setting(True, "Flux: one adapter over the stacked rows of q, k and v. false: one for each.",
                             advanced=True)
    target_pattern: str = setting("", "A regular expression: of these layers only those whose name it finds.",
                                  advanced=True)
    dropout: Fraction = setting(0.0, "Share of an adapter's inputs dropped while training.", advanced=True)
    diagonal: bool = setting(False, "stella, trilora: S is diagonal, r numbers instead of r × r.", advanced=True)
    gradient_scaling: bool = setting(True, "stella: scale updates so that columns of every size turn alike, by about "
                                     "lr·√d a step.", advanced=True)
    scale_dim: float = setting(0.0, "The d of gradient scaling; 0: the median size of the trained layers.",
                               advanced=True, ge=0.0, le=1e6)
    rank_target: float = setting(0.0, "With a diagonal S: cut the smallest singular values until the average rank is "
                                 "this; 0: never.", advanced=True, ge=0.0, le=512.0)
    start_from: str = setting("", "Continue from this LoRA file (.safetensors), whatever method made it.", path=True,
                              advanced=True)


class Train(Section):
    steps: int | None = setting(None, "Optimizer steps to train.", ge=1, le=10_000_000)
    epochs: int | None = setting(None, "Or: times through the data set.", ge=1, le=1_000_000)
    batch_size: int = setting(1, "Images per forward pass.", ge=1, le=1024)
    grad_accum: int = setting(1, "Forward passes per optimizer step.", advanced=True, ge=1, le=1024)
    optimizer: Literal["auto", "adamw", "adamw8bit", "scaled_adamw", "sgd", "stiefel"] = setting(
        "auto", "auto: the method's own. scaled_adamw: lora's gradients, each preconditioned by the other factor.",
        advanced=True)
    beta1: Fraction = setting(0.9, "AdamW's average of gradients.", advanced=True)
    beta2: Fraction = setting(0.999, "AdamW's average of squared gradients.", advanced=True)
    momentum: Fraction | None = setting(None, "Of sgd (left out: 0.9) and stiefel (0.95).", advanced=True)
    gradient_weight: float = setting(0.0, "stiefel: add this much of the present gradient to the momentum (Simplified "
                                     "AdEMAMix); 0 is none.", advanced=True, ge=0.0, le=1e4)
    lr: Rate | dict[Method, Rate] | None = setting(
        None, "Learning rate: a number, or one for each method as { lora = 1e-4, stella = 8e-4 }. "
        "Left out: the method's own.")
    lr_scheduler: Literal["constant", "cosine", "linear"] = setting("cosine", "How the learning rate falls.")
    warmup_steps: int = setting(0, "Steps over which the learning rate rises.", ge=0)
    up_lr_ratio: float = setting(1.0, "lora: learning rate of up over that of down (LoRA+; 16 is usual).",
                                 advanced=True, gt=0.0, le=1000.0)
    weight_decay: float = setting(0.0, "Weight decay; on the manifold only the free factors have any.", advanced=True,
                                  ge=0.0, le=10.0)
    cautious: bool = setting(False, "stiefel: decay only where the step and the weight agree in sign.", advanced=True)
    max_grad_norm: float = setting(1.0, "Gradient clipping; 0 is none.", advanced=True, ge=0.0)
    loss: Literal["mse", "huber"] = setting("mse", "Huber is kinder to outliers.", advanced=True)
    huber_delta: float = setting(0.1, "Where Huber turns from square to straight.", advanced=True, gt=0.0)
    timestep_sampling: Literal["auto", "uniform", "logit_normal", "sigmoid", "resolution"] = setting(
        "auto", "Flux: where between picture and noise to train. resolution: logit-normal, moved towards the noise for "
        "large pictures, as Flux draws them. auto: the family's own.", advanced=True)
    timestep_mean: float = setting(0.0, "Mean of the normal of logit_normal.", advanced=True, ge=-4.0, le=4.0)
    timestep_scale: float = setting(1.0, "Width of the normal of sigmoid, logit_normal and resolution.", advanced=True,
                                    gt=0.0, le=10.0)
    timestep_shift: float = setting(1.0, "Flux: moves all timesteps towards the noise, as 3 does for SD3; 1 is none.",
                                    advanced=True, gt=0.0, le=100.0)
    snr_gamma: float = setting(0.0, "Min-SNR weighting; 5 is usual, 0 is none.", advanced=True, ge=0.0)
    offset_noise: float = setting(0.0, "Noise that shifts whole channels; 0.05 helps very dark and bright images.",
                                  advanced=True, ge=0.0, le=1.0)
    ema_decay: Fraction = setting(0.0, "Running average of the adapter; 0.999 is usual for long runs, 0 is none.",
                                  advanced=True)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "Arithmetic of the frozen model. auto: bf16 on GPUs that have it, fp16 on older ones, fp32 on a CPU. "
        "fp32 makes no use of TF32.",
        advanced=True)
    compile: Literal["auto", "on", "off"] = setting(
        "auto", "Compile the model's blocks: faster steps, after half a minute or more for each shape of batch. auto: "
        "Flux, on runs so long that it pays.", advanced=True)
    matmul: Literal["auto", "off", "fp8", "int8"] = setting(
        "auto", "Frozen layers multiply in 8 bits, which is faster where they are large: int8 on GPUs from Ampere "
        "on, fp8 from Ada and Hopper on. auto: Flux, on long runs, where it proves faster and the gradients stay "
        "right; int8 first, as the more exact one.", advanced=True)
    deterministic: bool = setting(False, "Bit-exact repeats on a GPU, at some cost in speed.", advanced=True)
    seed: int = setting(0, "Decides data order, noise and starts.", ge=0, le=2**32 - 1)


class Memory(Section):
    device: str = setting("auto", "auto, cpu, cuda, one of several GPUs as cuda:1, or several together as cuda:0,1.",
                          advanced=True,
                          pattern=r"^(auto|cpu|mps|cuda(:\d+(,\d+)*)?)$")
    budget_gb: float = setting(0.0, "GPU memory that the run may take, in GiB; 0: what the GPU has. What is left to "
                               "auto below is chosen to fit.", ge=0.0, le=1024.0)
    quantize: Quantize = setting("auto", "The frozen model in fewer bits: half of 16 (fp8, int8) or about a quarter "
                                 "(nf4). auto: only as far as the budget needs.")
    quantize_text_encoder: Quantize = setting("auto", "The same for the text encoder while it encodes the captions.",
                                              advanced=True)
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] = setting(
        "auto", "What is computed again in the backward pass to hold less memory. selective: only what is cheap, for "
        "little time; full: everything, for about a third more. auto: as far as the budget needs.")
    offload_blocks: int = setting(-1, "Blocks of the model kept in the computer's memory and fetched when needed: less "
                                  "GPU memory, more time. -1: as the budget needs.", advanced=True, ge=-1, le=1000)
    shard: Literal["auto", "on", "off"] = setting(
        "auto", "Several GPUs share the frozen model: each holds a part and reads the others', for some time more. "
        "auto: when the budget needs it.", advanced=True)
    cuda_graphs: Literal["auto", "on", "off"] = setting(
        "auto", "Steps as CUDA graphs: the same numbers, faster, for more GPU memory. auto: SD 1.5, SDXL and "
        "compiled blocks, where there is memory enough.", advanced=True)


class Sample(Section):
    prompts: list[str] = setting([], "Prompts drawn while training, each with its own fixed seed.", kind="text")
    negative: str = setting("", "Negative prompt.", advanced=True)
    every: int = setting(250, "Draw every so many steps; 0: only at the end.", ge=0)
    before: bool = setting(True, "Draw once before training, to compare with.", advanced=True)
    seed: int = setting(1, "Seed of the first prompt; the next ones count up.", advanced=True, ge=0, le=2**32 - 1)
    steps: int = setting(20, "Sampler steps.", advanced=True, ge=1, le=200)
    guidance: Annotated[float, Field(ge=0.0, le=50.0)] | None = setting(
        None, "Guidance: with a negative prompt, or embedded (Flux.1 dev, Flux.2 dev). Left out: the family's own.",
        advanced=True)
    width: int = setting(0, "Width in pixels; 0: data.resolution.", advanced=True, ge=0, le=4096, multiple_of=8)
    height: int = setting(0, "Height in pixels; 0: data.resolution.", advanced=True, ge=0, le=4096, multiple_of=8)


class Evaluate(Section):
    folder: str = setting("", "Held-out images with captions, never trained on. Empty: holdout decides.", path=True)
    holdout: Annotated[float, Field(ge=0.0, le=0.5)] = setting(
        0.0, "Or: share of the data set kept out of training for validation.")
    every: int = setting(100, "Validation loss every so many steps; 0: only before and after.", ge=0)
    early_stop: int = setting(0, "End when so many validations in a row bring no new lowest loss; 0: never. The best "
                              "checkpoint is kept in any case.", advanced=True, ge=0, le=1000)
    images: int = setting(12, "Held-out images in the validation loss.", advanced=True, ge=1, le=4096)
    quantiles: int = setting(4, "Fixed timesteps at which each is measured.", advanced=True, ge=1, le=20)
    distance: Literal["auto", "inception", "efflite0", "off"] = setting(
        "auto", "Extractor for KID and FID. auto: Inception if its weights are here, else EfficientNet-Lite0.",
        advanced=True)
    generate: int = setting(24, "Images generated from held-out captions for KID and FID.", advanced=True,
                            ge=4, le=50_000)
    distance_every: int = setting(0, "Measure KID and FID every so many steps; 0: only at the end.", advanced=True,
                                  ge=0)
    inception_weights: str = setting("", "Inception weights file. Empty: looked for in torch's cache.", path=True,
                                     advanced=True)


class Output(Section):
    format: Literal["auto", "U1", "U2", "F1", "F5", "F6"] = setting(
        "auto", "Names in the exported file. auto: the family's usual, U1 (SD 1.5), U2 (SDXL) or F1 (Flux), which most "
        "programs read. U1, U2: kohya's with diffusers' or Stability's block names. Flux: F5 is kohya's, F6 is for "
        "ComfyUI and its older versions.", advanced=True)
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = setting(
        "auto", "Precision of the exported file. auto: the family's usual.", advanced=True)
    save_every: int = setting(250, "Checkpoint every so many steps; 0: by minutes only.", ge=0)
    save_minutes: float = setting(10.0, "And every so many minutes; 0: by steps only.", ge=0.0)
    keep: int = setting(3, "How many checkpoints stay, beside the best and the pinned.", ge=1, le=1000)
    weights: Literal["auto", "ema", "raw"] = setting(
        "auto", "Which weights are exported, sampled and validated. auto: the EMA when there is one.", advanced=True)
    title: str = setting("", "Title in the file's metadata. Empty: the run's name.", advanced=True)
    author: str = setting("", "Author in the file's metadata.", advanced=True)
    license: str = setting("", "Licence in the file's metadata.", advanced=True)
    cover: bool = setting(False, "Put the newest sample of the first prompt into the file, small, as its cover.",
                          advanced=True)
    full_paths: bool = setting(False, "Keep whole paths in the file's metadata, not only the last part of each.",
                               advanced=True)


class Log(Section):
    every: int = setting(1, "A step event every so many steps, and at least one a minute.", advanced=True, ge=1)
    rank_every: int = setting(25, "Effective rank every so many steps; 0: never.", ge=0)
    tensorboard: bool = setting(True, "Write TensorBoard event files too.", advanced=True)


class Preset(BaseModel):
    """A whole preset; `preset.load` reads, checks and completes one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = SCHEMA_VERSION
    model: Model
    data: Data
    adapter: Adapter = Adapter()
    train: Train
    memory: Memory = Memory()
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()
    output: Output = Output()
    log: Log = Log()


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation for name, field in Preset.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}

# Optimizer and learning rate of each method, when a preset leaves them out.
# stella: the paper's for SD1.5 (algorithms: AdamW, 8e-4); stiefel: its authors' 1e-4; lora: the field's usual.
METHOD_OPTIMIZER = {"lora": "adamw", "stiefel": "stiefel", "stella": "adamw", "trilora": "adamw"}
METHOD_LR = {"lora": 1e-4, "stiefel": 1e-4, "stella": 8e-4, "trilora": 8e-4}
OPTIMIZER_MOMENTUM = {"sgd": 0.9, "stiefel": 0.95}  # the others have none
METHOD_INITS = {
    "lora": ("default", "pissa", "olora"),
    "stiefel": ("default",),
    "stella": ("default", "random", "zero", "pseudo-zero", "svd-major", "svd-minor"),
    "trilora": ("default", "random", "zero", "pseudo-zero", "svd-major", "svd-minor"),
}
METHOD_RETRACTIONS = {
    "lora": ("default",), "trilora": ("default",),
    "stiefel": ("default", "qr"), "stella": ("default", "polar", "exponential"),
}
METHOD_OPTIMIZERS = {
    "lora": ("adamw", "adamw8bit", "scaled_adamw", "sgd"), "trilora": ("adamw", "adamw8bit", "sgd"),
    "stella": ("adamw", "adamw8bit", "sgd"), "stiefel": ("stiefel", "adamw", "adamw8bit", "sgd"),
}

# Settings of the base model that mean something for a family; preset rules refuse the others.
FAMILY_MODEL = {
    "sd15": ("vae", "text_encoder", "tokenizer", "prediction", "clip_skip"),
    "sdxl": ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "prediction", "clip_skip"),
    "flux1": ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    "flux2": ("vae", "text_encoder", "tokenizer", "distilled"),
}
UNET_TARGETS = ("attention", "feed_forward", "projection", "convolution", "text_encoder", "all")
FLOW_TARGETS = ("attention", "feed_forward", "single_blocks", "all")
FAMILY_FORMATS = {  # of exported files, the usual one first
    "sd15": ("U1", "U2"), "sdxl": ("U2", "U1"), "flux1": ("F1", "F5", "F6"), "flux2": ("F1", "F5", "F6"),
}
FAMILY_GUIDANCE = {"sd15": 5.0, "sdxl": 5.0, "flux1": 3.5, "flux2": 4.0}  # when a preset leaves it out
FLOW_FAMILIES = ("flux1", "flux2")
FLOW_GRID = 16  # pixels of a token: what sides are a multiple of

RESUMABLE = {"sample", "evaluate", "log"}  # sections a resume may change, beside train.steps


def fields(section: str) -> dict[str, Any]:
    """The fields of a section, by key: pydantic's `FieldInfo` with help, limits and `json_schema_extra`."""
    return dict(SECTIONS[section].model_fields)


def has_path(section: str, key: str) -> bool:
    """Whether a setting names something on the disk."""
    field = SECTIONS[section].model_fields[key]
    return bool((field.json_schema_extra or {}).get("path"))
