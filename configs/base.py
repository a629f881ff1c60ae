"""Every key that exists, its default and what it means; nothing else defines a default.

The defaults are the canonical run: ViT-B/16 with a GPT-2-base text tower by the DataComp recipe of
LeVLJEPA (arXiv 2607.00784). Other configs are a difference to this one.
"""

from ml_collections import ConfigDict


def get_config():
  """The default configuration; `main` locks it, so that a misspelt key raises."""
  c = ConfigDict()

  c.seed = 0  # of initialisation, sample order, augmentation and SIGReg directions
  c.steps = 200_000  # optimizer steps; the schedule ends there
  c.batch_size = 4096  # global: over all devices and processes
  c.accumulate = 1  # micro-batches per step; BatchNorm and SIGReg see one micro-batch at a time;
  # 0: as many as the device's memory asks for
  c.log_every = 50  # steps; also how often the collapse diagnostics are computed
  c.eval_every = 10_000  # 0: only at the end
  c.checkpoint_every = 2_000  # steps; 0: only at the end and when stopped
  c.keep_checkpoints = 2  # the newest so many stay
  c.keep_every = 0  # those whose step is a multiple stay too; 0: off
  c.keep_best = ""  # and the one with the highest EVALUATION/KEY, as "retrieval/val/i2t/avg/R@10";
  # "-EVALUATION/KEY" for the lowest. Every evaluation is then followed by a save
  c.peer_timeout = 60.0  # seconds without a sign of life from another process that end the run
  c.wandb = ""  # project name; needs the wandb package
  c.init_from = ""  # weights to start from: a checkpoint or its workdir, an exported folder, the
  # LeVLJEPA authors' files, timm's ViT, Hugging Face's GPT2Model; several are joined by commas

  c.mesh = ConfigDict()
  c.mesh.data = -1  # splits the batch; of data, fsdp, tensor one may be -1: what the others leave
  c.mesh.fsdp = 1  # splits batch, parameters and optimizer state
  c.mesh.tensor = 1  # splits attention heads, hidden units and their parameters
  c.mesh.slices = -1  # groups of devices with a slow network between, which split `data` alone; -1:
  # as the devices say (TPU slices, nodes of GPUs), a number: so many equal groups of neighbours

  c.model = ConfigDict()
  c.model.size = "base"  # nano, micro, tiny, small, base, large, huge: of both towers
  c.model.image_size = 224  # pixels, S; a multiple of patch_size
  c.model.patch_size = 16  # pixels
  c.model.statistics = "clip"  # image normalisation: clip (training, zero-shot), imagenet
  c.model.embed_dim = 256  # D; 256 in the released ViT-B, 768 in the release's configs
  c.model.hidden_dim = 2048  # of embedding heads and predictors
  c.model.predictor_depth = 4  # hidden layers; 0 removes the predictors
  c.model.predictor_dropout = 0.0  # 0 in both releases, 0.1 in a summary of the paper
  c.model.predict_from = "views"  # what predicts the caption in LeVLJEPA+: views (each view, as
  # release 1 computes it), mean (their mean, as the equation reads)
  c.model.patch_dropout = 0.0  # share of an image's patches that training does not look at (FLIP)
  c.model.scan = False  # True: one compiled layer in a loop, the same numbers; compiled in half the
  # time, but slower, because each kept array is copied, and the last layer computes what none
  # reads. On a CPU always, if model.remat recomputes: its compiler undoes that without a loop
  c.model.remat = "auto"  # none, names, dots, full: what the backward pass recomputes, from nothing
  # to all; auto: as little as the device's memory, by estimate, allows
  c.model.attention = "auto"  # how attention is computed, not what it is: short, xla (any chip),
  # pallas (TPUs, NVIDIA GPUs), cudnn (NVIDIA GPUs in bfloat16); auto: pallas on NVIDIA GPUs in
  # bfloat16, cudnn there for what that does not take, else short
  c.model.pointwise = "auto"  # how norms and GELU are computed, likewise: xla (any chip), pallas
  # (NVIDIA GPUs in bfloat16); auto: pallas where it can, else xla
  c.model.dtype = "auto"  # of the towers' computation; auto: bfloat16, float32 on CPU

  c.text = ConfigDict()
  c.text.length = 77  # tokens, L, EOT included; longer captions are cut and counted
  c.text.readout = "eot"  # eot (release 2), last (release 1)
  # "emoji" or "shapes" (embedded), a SentencePiece .model, GPT-2's tokenizer.json, or a folder with
  # tokenizer.json, with vocab.json and merges.txt, or with tokenizer.model
  c.text.tokenizer = ""

  c.objective = ConfigDict()
  c.objective.name = "levljepa"  # levljepa, levljepa_plus, clip, siglip
  c.objective.align = "mse"  # mse (mean over D), mse_sum (the paper's sum over D), cosine
  c.objective.stop_gradient = True  # on the predicted embeddings; False only to see it fail
  c.objective.lambda_img = 0.02  # weight of SIGReg on image embeddings; the alignment gets the rest
  c.objective.lambda_txt = 0.02  # the same on text embeddings
  c.objective.lambda_multi = 0.2  # levljepa_plus: the same of the views' distance to their mean
  c.objective.num_slices = 4096  # multiples of 64 run fastest
  c.objective.knots = 17  # T, points of the characteristic function in [0, t_max]
  c.objective.t_max = 3.0  # the last knot
  c.objective.group_size = 256  # rows per SIGReg statistic; the reference's local batch; 0: all
  c.objective.scale_rows = 256  # its multiplier; LeJEPA's library uses the global batch
  c.objective.scale = 1 / 0.07  # clip, siglip: the cosines' first scale; learned, as its logarithm
  c.objective.scale_max = 100.0  # clip: the scale is held at this
  c.objective.bias = -10.0  # siglip: the first bias; learned
  c.objective.chunk_size = 1024  # siglip: captions that a batch of images meets at once; 0: all

  c.optim = ConfigDict()
  c.optim.name = "adamw"  # adamw; muon: orthogonalised steps for the blocks' matrices, AdamW's else
  c.optim.lr = 2e-4  # at the end of warm-up
  c.optim.schedule = "cosine"  # cosine, wsd (warm-up, stable, cosine decay)
  c.optim.warmup = 1000  # steps
  c.optim.warmup_from = 0.0  # share of lr at step 0; 0.01 in release 2
  c.optim.final = 0.1  # share of lr at the last step
  c.optim.decay = 0.15  # wsd: share of the steps that decay
  c.optim.weight_decay = 0.01  # decoupled, times the learning rate, as PyTorch's
  c.optim.decay_on = "all"  # all (the reference) but learned scalars, matrices
  c.optim.b1 = 0.9  # decay of Adam's first moment
  c.optim.b2 = 0.999  # of the second
  c.optim.eps = 1e-8  # added to the second moment's root
  c.optim.mu_dtype = "float32"  # of the first moment; bfloat16: a sixth less training state
  c.optim.sharded = False  # mesh.data divides its state and the update, too, where sizes allow it:
  # less memory and less of its traffic on each device, more over the links (ZeRO's first stage)
  c.optim.clip = 1.0  # global norm; 0: off

  c.probe = ConfigDict()  # a linear probe that learns beside the encoder and never touches it
  c.probe.label = ""  # field of the records that holds a class, counted from 0; "": no probe
  c.probe.classes = 0  # how many there are; records without a class have no part
  c.probe.lr = 1e-3  # of its own Adam

  c.data = ConfigDict()
  c.data.source = "array_record"  # a name of jepa_vl.data.sources.SOURCES
  c.data.path = ""  # pattern of the training files: *, {00000..00099}, {a,b}, or their folder
  c.data.mix = ()  # in place of both: ((source, path, weight), ...), drawn in that proportion
  c.data.image_key = ""  # extension, column or field of the image; "": the usual names in order
  c.data.caption_key = ""  # of the caption; also a field within a json member
  c.data.image_root = ""  # folder of the images that a table names; "": the table's own
  c.data.index_dir = ""  # folder for the indexes of tars; "": beside each tar, else ~/.cache
  c.data.split = "train"  # of sources that have several, and what "{split}" in a path stands for
  c.data.workers = 0  # processes; 0: a thread of the training process
  c.data.timeout = 600.0  # seconds without a batch that end the run; 0: never
  # A larger share of records that cannot be used, among the latest 100,000 rows of a process of the
  # run, ends it (if they are more than ten, and more than chance explains).
  c.data.max_bad_fraction = 0.01
  c.data.augment = "standard"  # standard (release 2), resize (release 1), dino (LeVLJEPA+)
  c.data.low_res = ()  # (pixels, steps): so many first steps see images of a smaller side
  c.data.crop_scale = (0.8, 1.0)  # share of the image's area that a random crop takes
  c.data.flip = 0.5  # probability of a horizontal flip
  c.data.jitter_prob = 0.3  # probability of colour jitter
  c.data.jitter = (0.2, 0.2, 0.2, 0.05)  # brightness, contrast, saturation, hue
  c.data.grey_prob = 0.05  # probability of greyscale
  c.data.global_views = 2  # dino: views of image_size, of which crop_scale is the share
  c.data.local_views = 4  # dino: views of local_size
  c.data.local_size = 96  # dino: pixels; a multiple of patch_size
  c.data.local_scale = (0.05, 0.4)  # dino: share of the image's area that a local view takes
  c.data.blur_prob = (1.0, 0.1, 0.5)  # dino: first global view, other global ones, local ones
  c.data.solarise_prob = (0.0, 0.2, 0.0)  # dino: the same three
  c.data.tag_prob = 0.5  # how often tags, if there are any, join the caption on both sides
  c.data.text_packing = False  # captions share rows of the text tower: same numbers, less time
  c.data.packing_group = 32  # captions that share rows; divides a device's rows of a micro-batch
  c.data.packing_tokens = 32  # mean tokens per caption, EOT included, that there is room for
  c.data.sets = ""  # folder of the evaluation sets that configs/evals.py names
  c.data.eval_resize = 256 / 224  # shorter side over crop side in evaluations

  c.evals = ConfigDict()  # name -> what jepa_vl/evals/__init__.py documents
  return c
