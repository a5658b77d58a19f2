// What each measure means and what is good: one text for each, shown behind a question mark wherever the measure stands.
"use strict";
(() => {
  const Studio = (globalThis.Studio ??= {});

  /** key: [what is explained, the text; a line break begins a new paragraph]. */
  Studio.HELP = {
    loss: ["loss", "How far the model's guess is from the truth, on the training images. Each step sees other images and other "
      + "noise, so the raw curve jumps; look at the smoothed one.\nValidation loss is measured on held-out images, always "
      + "with the same noise. Good: it falls. When it rises while the training loss falls, the adapter begins to learn "
      + "the images by heart: an earlier checkpoint may be better."],
    lr: ["the learning rate", "The size of a step. It follows train.lr, train.warmup_steps and train.lr_scheduler."],
    erank: ["effective rank", "How many directions an adapter really uses, of those that its rank gives it (exp of the entropy of its singular "
      + "values, mean of a group of layers).\nGood: well above 1, and not glued to the rank. Close to the rank: a higher "
      + "rank may hold more. Far below it: a lower rank would do, with a smaller file. LoRA and Stiefel begin low and climb; "
      + "StelLA begins with every direction in use, so there it falls as some directions win."],
    stable: ["stable rank", "The sum of the squared singular values divided by the largest of them squared. It asks the same as effective "
      + "rank, but only strong directions count. Good: above 1. At 1 a single direction does all the work."],
    blocks: ["the map of effective rank", "One row for each block of the model, in the model's order, one column for each measurement. The "
      + "scale above tells which colour stands for which number.\nRows that stay low: these blocks learn one thing only, or "
      + "hardly anything. Rows that come close to the rank: these blocks want more room. Choose a cell to see its spectrum."],
    spectrum: ["the spectrum", "The singular values of the block's adapters, each divided by the largest: how strong each direction is. The first "
      + "bar is always 1.\nA steep fall: few directions do the work. A flat row: all of them are used alike. The dashed "
      + "marks are those of the first measurement."],
    distance: ["the distance (KID, FD)", "How far the look of generated images is from held-out ones that were never trained on. Lower is better; 0 "
      + "is as alike as two samples of the same style.\nKID does not depend on how many images there are, so it is the "
      + "number to trust, with its 95 % interval (jackknife). When two intervals overlap, no difference is shown.\nFD "
      + "falls with more images alone: compare it only with the same counts, extractor, prompts and seeds, and with its "
      + "floor, which is the FD between two halves of the held-out images."],
    levels: ["validation loss by noise level", "The validation loss at a few fixed amounts of noise, from little (fine detail) to much (the layout of "
      + "the picture).\nGood: all curves fall, or stay. When those of much noise rise first, the adapter learns the layouts of "
      + "the training images by heart. When those of little noise stay high, it has not learned the fine texture."],
    bins: ["training loss by noise level", "The raw training loss, split by how much noise the images had: 0 is a clean image, 1 is pure noise. The bars "
      + "are the newest tenth of the run, the dashed marks its first tenth.\nGood: the bars stand below the marks. Levels "
      + "always differ from each other: compare a bar with its mark, not with its neighbours."],
    hard: ["hard images", "How much larger the loss of an image is than the usual one at the same noise level. 1 is like the others, "
      + "2 is twice as hard. Images that were seen a few times only count for less.\nAn image that stays far above 1 is "
      + "often unlike the others, badly cropped, of low quality, or its caption does not say what it shows. Look at the "
      + "caption first; the link leads there."],
    samples: ["this matrix", "The same prompts with the same seeds at different steps, so that what changes is the adapter alone. "
      + "The first column is the base model.\nGood: the style comes in while the subject of the prompt stays. When all "
      + "pictures begin to look alike or like a training image, it is trained too far."],
    checkpoints: ["a checkpoint", "All that is needed to go on from a step: the adapter, the optimizer, the order of the images. Old ones are "
      + "deleted as new ones come (output.keep), except the best and those that you keep.\nA branch is a new run that starts "
      + "from a checkpoint with other settings; the old run stays as it is."],
    best: ["the best checkpoint", "Chosen by KID where it was measured and its interval tells two checkpoints apart, else by the validation loss. The "
      + "reason is told with it. It is never deleted."],
    facts: ["these numbers", "Step: how many of the planned ones are done.\nSpeed: the time of one step, with everything in it.\nGPU memory: what "
      + "the run holds now, and the most it ever held. When the peak is close to what the card has, other programs on it can "
      + "end the run.\nLoss: that of the newest step; it jumps. Validation: the loss on held-out images, which can be trusted more."],
  };

  /** The question mark for a measure. */
  Studio.helpOn = (key) => Studio.help(...Studio.HELP[key]);
})();
