"""Every key, its default and what it means. No logic: recipes change values, nothing else does."""

from typing import Any

from ml_collections import ConfigDict, FieldReference


def _or_auto(value: float) -> Any:
    """A number that a recipe may replace by "auto"."""
    return FieldReference(value, field_type=object)


def get_config() -> Any:
    c: Any = ConfigDict()

    c.run_dir = "runs/default"  # checkpoints, metrics, logs and the resolved config go here
    c.seed = 0  # shuffling, initialisation and sampling follow from it
    c.log_level = "info"  # debug | info | warning | error: messages on stderr from this level on

    # auto: $XDG_CACHE_HOME/dcod_jax/programs (~/.cache/...) | a directory | empty: none
    c.compilation_cache = "auto"  # compiled programs are kept here for the next start
    c.compare = ()  # variants trained from one start: ("sft loss.weights.name=uniform", ...)

    for section in (_models, _traces, _loss, _training, _machines, _sampling, _results):
        section(c)
    return c.lock()


def _models(c: Any) -> None:
    """The student, and the teacher that is asked about the traces."""
    c.student = ConfigDict()
    c.student.path = ""  # HF directory or .gguf file: architecture and initial weights
    c.student.config = ""  # HF config.json (or its directory): random initial weights instead
    c.student.tokenizer = ""  # HF tokenizer directory; empty: the one beside student.path
    c.student.chat_template = ""  # Jinja file in place of the tokenizer's, or chatml | deepseek_r1
    c.student.template_kwargs = ()  # its variables: ("enable_thinking=false",)
    c.student.template_date = "2024-07-26"  # the day that a template with a clock shows
    c.student.compute_dtype = "bfloat16"  # matrix products and activations; master weights fp32
    # none | dots | attention (keeps what it mixed) | full: what the backward pass recomputes per
    # layer | dots:K: attention but for the last K layers | offload: full, inputs in host memory |
    # auto: what fits
    c.student.remat = "full"  # details: docs/scaling.md
    # auto: the devices' kernel (docs/scaling.md) | splash (TPU) | cudnn (GPU) | scanned | blocked
    c.student.attention = "auto"  # the teacher's too
    c.student.lora = ConfigDict()
    c.student.lora.rank = 0  # train adapters of this rank beside a frozen student.path; 0: all
    c.student.lora.alpha = 16.0  # their product is scaled by alpha / rank
    c.student.lora.rslora = False  # scale by alpha / sqrt(rank) instead
    c.student.lora.targets = (".*_proj",)  # linear maps of a layer: names or regular expressions

    c.teacher = ConfigDict()
    c.teacher.path = ""  # HF directory or .gguf file of the teacher that scores the traces
    c.teacher.name = ""  # name in the manifest; empty: the directory's name
    c.teacher.revision = ""  # revision that the manifest names
    c.teacher.tokenizer = ""  # HF directory; empty: beside the path; of a server: the student's
    # Where its tokenizer is not the student's (docs/other_tokenizer.md):
    c.teacher.chat_template = ""  # Jinja file in place of its own, or chatml | deepseek_r1
    c.teacher.template_kwargs = ()  # its variables: ("enable_thinking=false",)
    c.teacher.dtype = "bfloat16"  # weights and compute dtype of the teacher


def _traces(c: Any) -> None:
    """The traces, how they become a dataset, and the teacher's log-probs of them."""
    c.data = ConfigDict()
    c.data.traces = ""  # raw traces: .jsonl files, a glob, or an HF dataset (path or hub id)
    c.data.eval_traces = ""  # raw held-out traces, same forms; empty: split off by eval_fraction
    c.data.split = "train"  # split to read from an HF dataset
    c.data.dataset = ""  # trace dataset directory; empty: run_dir/dataset, written by prepare
    c.data.eval_fraction = 0.0  # share of the traces held out by a hash of their prompt
    c.data.max_length = 2048  # longest trace in tokens; a longer one is dropped and counted
    c.data.seq_len = 2048  # tokens in a packed row
    c.data.batch_size = 8  # packed rows in a global batch
    c.data.head_tokens = 0  # most supervised tokens in a packed row; 0: from the dataset's lengths
    c.data.prefetch = 4  # batches read ahead
    c.data.verify_checksums = True  # hash every shard when the dataset is opened

    c.prepare = ConfigDict()
    # auto, or a preset: the names of a public data set's columns
    c.prepare.form = "auto"  # auto | openr1 | s1k | ... (docs/data.md)
    c.prepare.prompt_field = ""  # name of the prompt field; empty: prompt or a synonym
    c.prepare.completion_field = ""  # or name_* for several; empty: completion or a synonym
    c.prepare.answer_field = "answer"  # name of the reference answer field
    c.prepare.reasoning = "auto"  # auto (kept) | keep (a trace without any is dropped) | drop
    c.prepare.reasoning_field = ""  # where it is; empty: the usual names
    c.prepare.teacher_field = "teacher"  # field with the name of a trace's teacher (score.teachers)
    c.prepare.weight_field = ""  # field with a trace's weight in the loss; empty: none
    c.prepare.system_prompt = ""  # system message put before traces that have none
    c.prepare.filter_correct = True  # drop traces whose final answer is wrong (where answer exists)
    c.prepare.deduplicate = True  # drop traces equal in prompt and completion
    c.prepare.overlap_files = ()  # evaluation sets (JSONL): traces that overlap are dropped
    c.prepare.overlap_ngram = 13  # words in a shared n-gram that counts as overlap
    c.prepare.logprobs = "ignore"  # ignore | require: log-probs delivered with the traces
    c.prepare.record_bytes = 0  # longest record read; 0: 4096 bytes a token of data.max_length
    c.prepare.on_bad_record = "error"  # error | quarantine: a record that is malformed
    c.prepare.shard_records = 8192  # traces in a shard
    # Prepare again over a dataset of other inputs; score keeps the scores of unchanged traces
    c.prepare.replace = False  # docs/teachers.md

    c.score = ConfigDict()
    c.score.top_k = 0  # also store the teacher's top-k distribution; 0: the trace token only
    c.score.batch_tokens = 16384  # tokens in a scoring batch, padding included
    c.score.student = False  # also store log q of student.path, the start, of the trace token
    c.score.overwrite = False  # replace log-probs that another teacher wrote
    # URL of a server that scores in place of teacher.path and knows the model as teacher.name
    c.score.server = ""  # http://host:8000 (docs/teachers.md)
    c.score.dialect = "vllm"  # vllm | sglang | llama_server | llama_cpp: how it is asked
    c.score.concurrency = 16  # requests to a server at one time
    c.score.retries = 8  # attempts after the first one at a request that failed
    c.score.timeout = 600.0  # seconds after which a request has failed
    # Several teachers, each of its own traces: ("a path=models/A", "b server=http://... model=B")
    c.score.teachers = ()  # docs/teachers.md


def _loss(c: Any) -> None:
    """What a step minimises, and on whose text."""
    c.loss = ConfigDict()
    # nll | forward_kl | reverse_kl | jsd | todi | skew_kl | skew_reverse_kl | taid
    c.loss.divergence = "nll"  # nll: the trace token; the others need the teacher's distribution
    c.loss.teacher = "cached"  # cached: what score stored | live: teacher.path inside each step
    c.loss.alpha = 1.0  # share of the divergence; the rest is nll
    c.loss.anchor = 0.0  # share of the divergence added outside the weights (ASFT)
    c.loss.temperature = 1.0  # both models' logits are divided by it (live teacher only)
    c.loss.temperature_squared = True  # multiply the divergence by temperature squared
    c.loss.beta = 0.5  # jsd: 0 is forward KL, 1 reverse KL
    c.loss.skew = 0.1  # skew_kl and skew_reverse_kl: the share mixed in
    c.loss.taid_start = 0.4  # taid: the interpolation to begin with
    c.loss.taid_end = 1.0  # taid: the interpolation to end with; 1 is the teacher
    c.loss.taid_alpha = 5e-4  # taid: how fast the interpolation may run ahead of its schedule
    c.loss.taid_beta = 0.99  # taid: memory of the loss's relative change
    c.loss.teacher_weights = ()  # of traces in the loss by their teacher: ("a=0.5",); others 1
    c.loss.router_balance = 0.0  # weight of the load-balance loss of the student's experts
    c.loss.head_chunk = 480  # tokens whose logits exist at one time in the vocabulary head
    c.loss.weights = ConfigDict()
    # uniform | sigmoid (DisCorD) | clip | power | dft | q_power | q_threshold | idft | eaft |
    # drift_share | advantage | auto (one weight a trace, no knob)
    c.loss.weights.name = "sigmoid"  # docs/losses.md has their formulas
    # What the log-ratio r compares; start: the student before training, scored by score.student
    c.loss.weights.ratio = "student/teacher"  # student/teacher | start/teacher | student/start
    # What the weight's signal is divided by: r, or the logarithm of q (q_power) or of an entropy
    # (eaft), where a temperature of 2 takes the square root. The paper's values are unknown to us.
    c.loss.weights.temperature = _or_auto(1.0)  # a number, or auto
    # Of the temperature. spread: the deviation of r over the stream's traces, or its tokens
    c.loss.weights.unit = "nats"  # nats | spread (of traces where scope is sequence)
    c.loss.weights.offset = _or_auto(0.0)  # added to the log-ratio inside the sigmoid, or "auto"
    # The automatic temperature aims at target_loss, target_ess or, where both are 0, target_mean
    c.loss.weights.target_loss = 0.9  # share of the loss that the weights leave; 0: another target
    c.loss.weights.target_ess = 0.0  # effective sample size of the weights; 0: another target
    c.loss.weights.target_mean = 0.5  # mean raw weight; also what the automatic offset aims at
    c.loss.weights.smoothing = 0.9  # auto: memory over steps; 0: solved in this step (a pass more)
    c.loss.weights.clip = 2.0  # upper bound of clip and power; of advantage on both sides
    c.loss.weights.threshold = 0.1  # q_threshold: the lowest q(y) that counts
    c.loss.weights.scope = "token"  # token | prefix | sequence: where the log-ratio is averaged
    # what each token of a span has as its log-ratio, where the teacher has another tokenizer: the
    # span's mean, the whole span's, or its own log q minus the span's mean log p
    c.loss.weights.span = "mean"  # mean | sum | token: log-ratio of a teacher's other tokens
    c.loss.weights.normalize = "mean"  # mean | none | sequence
    c.loss.weights.warmup_steps = 0  # steps over which the weights rise from 1 to their value

    c.on_policy = ConfigDict()
    c.on_policy.fraction = 0.0  # GKD: probability that a batch's completions are the student's own
    c.on_policy.max_new_tokens = 256  # longest completion sampled
    c.on_policy.temperature = 1.0  # sampling temperature


def _training(c: Any) -> None:
    """The optimizer, the loop and its profile."""
    c.optim = ConfigDict()
    c.optim.learning_rate = 1e-5  # peak
    c.optim.schedule = "cosine"  # cosine | linear | constant, after warmup
    c.optim.warmup_steps = 10  # steps of linear warmup from 0
    c.optim.final_fraction = 0.1  # learning rate at the end, as a share of the peak
    c.optim.weight_decay = 0.0  # AdamW, on matrices only
    c.optim.b1 = 0.9  # AdamW first moment
    c.optim.b2 = 0.95  # AdamW second moment
    c.optim.eps = 1e-8  # AdamW epsilon
    c.optim.clip_norm = 1.0  # global gradient norm; 0: no clipping
    c.optim.on_nonfinite = "stop"  # stop | skip: a step whose loss or gradient is not finite
    # skip a step whose gradient norm is more than this times the 0.95 quantile of those of the
    # last 100 steps; 0: never
    c.optim.spike_factor = 0.0  # docs/method.md
    c.optim.max_skipped = 20  # skipped steps after which the run stops
    c.optim.offload = False  # AdamW's moments wait in host memory between steps

    c.train = ConfigDict()
    c.train.steps = 1000  # optimizer steps
    c.train.microbatches = 1  # pieces a batch is split into for gradient accumulation
    c.train.gradient_dtype = "float32"  # float32 | bfloat16: of sums of gradients between devices
    # placed: reduce-scatters placed by hand | plain: as XLA's partitioner sums them
    c.train.gradient_sums = "placed"  # between devices
    c.train.log_every = 10  # steps between metric lines
    c.train.eval_every = 100  # steps between held-out losses; 0: never
    c.train.eval_batches = 0  # held-out batches; 0: all
    c.train.eval_problems = ""  # JSONL of problems answered greedily as it trains (evaluate.*)
    c.train.eval_problems_every = 0  # steps between two rounds of them; 0: train.eval_every
    c.train.save_every = 100  # steps between checkpoints; 0: only at the end
    c.train.keep = 2  # newest checkpoints kept, beside the best
    c.train.local_dir = ""  # also save to this directory of each host's own disk; empty: do not
    c.train.local_every = 0  # steps between checkpoints in train.local_dir, less than save_every
    # eval/nll | eval/loss | accuracy (of train.eval_problems): chooses the checkpoint that is kept
    # and exported; empty: the newest
    c.train.best_metric = "eval/nll"  # the better of two equal ones is the later
    # A run directory, or one checkpoint in it: runs/x/checkpoints/8
    c.train.init_from = ""  # run or checkpoint whose parameters to start from
    # stop: name the damaged file and the newest whole checkpoint. previous: go on from that one and
    # move the damaged one to run_dir/damaged
    c.train.on_damaged_checkpoint = "stop"  # stop | previous
    # What a run learns from is in its checkpoints: shards, teacher, top-k, tokenizer, template.
    c.train.accept_changed_data = False  # resume although these differ, and record the change
    c.train.progress = True  # progress bars

    c.profile = ConfigDict()
    c.profile.steps = ""  # first:last, both traced by XProf into run_dir/profile; empty: none


def _machines(c: Any) -> None:
    """Devices, processes, and the slice that a plan is for."""
    c.plan = ConfigDict()
    # what plan compiles for: v5e:4x4, v5p:2x2x4, v6e:16x16, ..., cpu:8, or gpu:1 of this machine
    c.plan.topology = ""  # details: docs/scaling.md
    c.plan.slices = 1  # slices of that topology, joined by the data-centre network
    c.plan.hbm_gib = 0.0  # memory limit of a device in GiB; 0: what libtpu reports for the chip
    c.plan.largest_batch = True  # search the largest batch that fits (several compilations)

    c.mesh = ConfigDict()
    c.mesh.data = -1  # replicas; -1: the devices that are left
    c.mesh.fsdp = 1  # pieces parameters and optimizer are split into
    c.mesh.expert = 1  # pieces the experts of a layer are split into, and all else as by fsdp
    c.mesh.tensor = 1  # pieces heads, mlp and vocabulary are split into
    c.mesh.context = 1  # pieces the positions of a row are split into, for long traces
    c.mesh.slices = -1  # TPU slices joined by the data-centre network; -1: as the devices report

    c.hosts = ConfigDict()
    c.hosts.coordinator = ""  # host:port of process 0; empty: hosts.cluster says who takes part
    c.hosts.processes = 0  # processes of the run, where hosts.coordinator is set
    c.hosts.process_id = -1  # this process, 0 to processes - 1, where hosts.coordinator is set
    c.hosts.cluster = "auto"  # auto (a TPU slice says it) | none | slurm | ompi | mpi4py | k8s
    c.hosts.connect_timeout = 300.0  # seconds to wait for all processes at the start
    c.hosts.heartbeat = 60.0  # seconds without a heartbeat after which a process is lost
    c.hosts.timeout = 1800.0  # seconds without progress of any process after which the run is stuck


def _sampling(c: Any) -> None:
    """What is sampled: traces, answers, and continuations for drift."""
    c.generate = ConfigDict()
    c.generate.prompts = ""  # prompts JSONL (prompt, answer): sample traces from the teacher first
    c.generate.model = "teacher"  # teacher | student: whose samples; student: Lightning OPD
    c.generate.samples = 1  # traces sampled for each prompt
    c.generate.temperature = 1.0  # sampling temperature; log-probs are always at temperature 1
    c.generate.top_p = 1.0  # sample from the smallest set of tokens with this probability
    c.generate.top_k = 0  # sample from this many most probable tokens; 0: all
    c.generate.min_p = 0.0  # leave out tokens below this share of the most probable one
    c.generate.stop = ()  # texts that end a trace
    c.generate.max_new_tokens = 256  # longest completion sampled
    c.generate.batch_size = 64  # sequences decoded together

    c.evaluate = ConfigDict()
    c.evaluate.problems = ""  # held-out problems JSONL (prompt, answer)
    c.evaluate.sets = ()  # benchmarks (docs/evaluation.md), "name=FILE [prompt_field=…] …"
    c.evaluate.limit = 0  # problems to take of each; 0: all
    c.evaluate.samples = 1  # answers for each problem: pass@1 is their mean, pass@k, maj@k
    c.evaluate.temperature = 0.0  # sampling temperature; 0: greedy
    c.evaluate.top_p = 1.0  # sample from the smallest set of tokens with this probability
    c.evaluate.top_k = 0  # sample from this many most probable tokens; 0: all
    c.evaluate.min_p = 0.0  # leave out tokens below this share of the most probable one
    c.evaluate.stop = ()  # texts that end an answer
    c.evaluate.form = "chat"  # chat: the model's template | plain: "Question: ... Answer:"
    c.evaluate.shots = 0  # worked examples before each problem
    c.evaluate.exemplars = ""  # JSONL of worked {prompt, completion}; empty: eight built in
    c.evaluate.instruction = "auto"  # text after each problem; auto: the benchmark's own
    c.evaluate.grade_truncated = False  # the last number of an answer that was cut off counts
    c.evaluate.max_new_tokens = 256  # longest answer
    c.evaluate.batch_size = 64  # sequences decoded together

    c.drift = ConfigDict()
    c.drift.prompts = ""  # prompts JSONL to continue; empty: evaluate.problems
    c.drift.limit = 0  # prompts to take; 0: all
    c.drift.samples = 1  # continuations of each prompt, from the teacher and from each student
    c.drift.max_new_tokens = 256  # longest continuation, and the longest length of the curves
    c.drift.batch_size = 64  # sequences sampled together
    c.drift.resamples = 2000  # bootstrap resamples behind an interval


def _results(c: Any) -> None:
    """What is made of runs: the page, the tuned recipe, the exported model."""
    c.report = ConfigDict()
    c.report.at_end = False  # train writes the HTML report when it is done
    c.report.path = ""  # HTML file; empty: run_dir/report.html
    c.report.runs = ()  # directories of other runs to show beside this config's
    c.report.traces = 12  # held-out traces shown token by token; 0: none, and no weight histogram
    c.report.points = 500  # points of a curve; a longer one keeps its extremes

    c.tune = ConfigDict()
    # "optim.learning_rate=1e-5|3e-5": every combination of the entries' alternatives is a candidate
    c.tune.grid = ()  # an alternative may be several changes, with spaces between (docs/tune.md)
    c.tune.budget = 0  # optimizer steps of all candidates; 0: four times train.steps
    c.tune.factor = 3  # one in this many goes on to the next round

    c.export = ConfigDict()
    c.export.path = ""  # HF directory, or the parent of the variants' ones; empty: run_dir/export
    c.export.dtype = "bfloat16"  # dtype of the written weights
    c.export.adapter = False  # write a PEFT directory of the adapters in place of the whole model
    c.export.step = -1  # checkpoint step; -1: the best by train.best_metric, else the newest
    c.export.max_shard_gb = 4.0  # larger weights are split into files of this size
