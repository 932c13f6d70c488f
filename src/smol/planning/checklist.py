"""Whether to train at all, what, and how: the playbook's checklist as one function.

The questions, their order (why, what, how) and their answers are those of the Smol Training
Playbook (https://huggingface.co/spaces/HuggingFaceTB/smol-training-playbook).
"""

from dataclasses import dataclass, field

from smol.model.flops import num_parameters
from smol.planning import compute
from smol.planning.answers import GIB, GPUS_PER_NODE, MODELS, Answers, Recipe, recipe
from smol.planning.spreading import Option, options

TIGHT_WEEKS = 12
"""SmolLM3's three months, which were too short for anything but a dense model."""
DISK_BANDWIDTH = 1e9  # bytes per second that a process writes to a local disk
MUCH = 1e9  # tokens, beyond which a laptop's recipe is no recipe
PURPOSES = {
    "research": "neither prompting nor fine-tuning answers the question. Keep it to one sharp one.",
    "product": "neither prompting nor fine-tuning is enough, as with a vocabulary of its own, "
    "limits of deployment or rules about the data.",
    "open_source": "there is a gap that no open model fills. Name it before the run.",
}


@dataclass(frozen=True)
class Figure:
    """A number in words, and the formula that it comes from."""

    name: str
    value: str
    formula: str


@dataclass
class Decision:
    """Where the checklist ends.

    Attributes:
        verdict: One sentence.
        reasons: For it, in the order of the questions.
        figures: What a run takes.
        options: Ways to spread it over the devices, in the order of preference.
        warnings: What will not work, or not well.
        configs: Files to start from.
        flags: Names and values of what to set over them.
        before: Commands that come first.
    """

    verdict: str
    reasons: list[str]
    figures: list[Figure] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    configs: list[str] = field(default_factory=list)
    flags: dict[str, str] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)

    @property
    def commands(self) -> list[str]:
        """What to type."""
        if not self.configs:
            return self.before
        words = [f"--config {file}" for file in self.configs]
        words += [f"{name} {value}" for name, value in self.flags.items()]
        return [*self.before, " ".join(["python src/train.py fit", *words])]


def decide(answers: Answers) -> Decision:
    """Go through the checklist.

    Args:
        answers: To its questions.

    Returns:
        A verdict with reasons, figures, warnings and the command to start with.

    Raises:
        UserError: An answer makes no sense, or names what does not exist.
    """
    answers.check()
    if answers.goal == "learn":
        why = "the goal is to learn how it is done. The nano model shows every stage in minutes."
        verdict = "Train."
    elif answers.prompting != "not_enough":
        tried = "is enough" if answers.prompting == "enough" else "has not been tried"
        return Decision(
            "Do not train: prompt a model that exists.",
            [f"Why: prompting {tried}. A few days with an open model show how far it goes."],
            before=["python src/chat.py HUGGINGFACE_FOLDER"],
        )
    elif answers.fine_tuning != "not_enough":
        return _fine_tune(answers)
    else:
        verdict, why = "Pretrain.", PURPOSES[answers.goal]
    decision = Decision(verdict, [f"Why: {why}"])
    _what(answers, decision)
    _how(answers, recipe(answers), decision)
    return decision


def _fine_tune(answers: Answers) -> Decision:
    tried = "is enough" if answers.fine_tuning == "enough" else "has not been tried"
    decision = Decision(
        "Fine-tune a model that exists; do not pretrain.",
        [
            f"Why: prompting is not enough, and fine-tuning {tried}. Even a trillion tokens on top "
            "of an open model are cheaper than ten trillion from nothing.",
            "What: supervised fine-tuning first; then preferences, then rewards.",
        ],
    )
    if answers.model == "nano":
        decision.before = [
            f"python src/train.py fit --config configs/{phase}.yaml"
            for phase in ("stage1", "stage2", "stage3", "mid_training")
        ]
        decision.configs = ["configs/sft.yaml"]
        decision.reasons.append("How: for practice, on what the nano model itself has learnt.")
        return decision
    decision.before = ["python src/convert.py import HUGGINGFACE_FOLDER data/imported"]
    if answers.model == "3b":
        decision.configs = ["configs/smollm3_3b/sft.yaml"]
    else:
        decision.configs = ["configs/sft.yaml", recipe(answers).files[-1]]
    decision.flags = {"--init_from": "data/imported"}
    return decision


def _what(answers: Answers, decision: Decision) -> None:
    """Dense, mixture of experts or hybrid: the playbook's flowchart."""
    why = ""
    if answers.deployment == "edge":
        why = "it has to fit into the memory of a device"
        if answers.experience == "expert":
            why += " (experts may weigh a hybrid)"
    elif answers.experience == "first":
        why = "it is the team's first"
    elif answers.experience == "dense" and answers.weeks <= TIGHT_WEEKS:
        why = f"{answers.weeks:g} weeks are short for a kind that the team has not trained"
    if why:
        decision.reasons.append(f"What: a dense decoder, because {why}.")
        return
    decision.reasons.append(
        "What: a mixture of experts, alone or with a hybrid, is what the playbook would weigh: "
        "servers have the memory, and the team has experience and time."
    )
    decision.warnings.append(
        "This project has dense decoders only; what follows is the dense plan to compare with."
    )


def _how(answers: Answers, recipe: Recipe, decision: Decision) -> None:
    """Tokens, time, money, memory, checkpoints, data, and the command."""
    time = _time(answers, recipe, decision)
    _data(answers, recipe, decision)
    decision.options = options(answers, recipe)
    chosen = next((option for option in decision.options if option.fits), None)
    if chosen is None:
        chosen = min(decision.options, key=lambda option: option.plan.total)
        decision.warnings.append(
            f"It does not fit: a process takes {chosen.plan.total / GIB:.1f} GiB at the least, and "
            f"can use {answers.room / GIB:.1f}. Take more or larger devices, a smaller model, or "
            "fewer --micro_batch_tokens."
        )
    parts = ", ".join(f"{k} {v / GIB:.2g}" for k, v in chosen.plan.parts.items() if v >= 2**20)
    memory = Figure(
        "memory per process",
        f"{chosen.plan.total / GIB:.2g} of {answers.room / GIB:.3g} GiB",
        f"{chosen.name}, {chosen.work.tokens} tokens at a time; worst at {chosen.plan.moment}: "
        f"{parts}",
    )
    decision.figures.append(memory)
    _checkpoints(answers, recipe, time.days, decision, chosen)
    _start(answers, recipe, decision, chosen)


def _time(answers: Answers, recipe: Recipe, decision: Decision) -> compute.Compute:
    config, tokens = recipe.config, recipe.tokens
    size, speed = num_parameters(config), answers.speed
    time = compute.training_compute(config, tokens, recipe.context, answers.devices, speed)
    of = f"{answers.device} peak x MFU {answers.mfu:.0%}" if answers.on_gpu else "seen on 2 cores"
    hours = "GPU-hours" if answers.on_gpu else "process-hours"
    decision.figures += [
        Figure("parameters", short(size), "embedding + layers x (attention + SwiGLU + norms)"),
        Figure(
            "tokens",
            f"{short(tokens)} ({plain(tokens / size)} each)",
            f"{compute.TOKENS_PER_PARAMETER:g} for each parameter make the best loss of the "
            "compute (Hoffmann et al. 2022); more make the better model of this size",
        ),
        Figure(
            "FLOPs per token",
            short(time.flops_per_token),
            f"6 x matrices + 12 x layers x heads x head_dim x {recipe.context} (PaLM)",
        ),
        Figure("FLOPs", f"{time.flops:.3g}", "tokens x FLOPs per token"),
        Figure(
            "tokens/s per process",
            plain(time.tokens_per_second),
            f"{speed / 1e12:.4g} TFLOP/s ({of}) / FLOPs per token",
        ),
        Figure(hours, plain(time.device_hours), "tokens / tokens/s / 3600"),
        Figure("time", duration(time.days), f"{hours} / {answers.devices}, never interrupted"),
    ]
    paid = time.device_hours
    if answers.goal != "learn":
        paid *= 1 + compute.TRIALS_SHARE
        formula = f"{1 + compute.TRIALS_SHARE:.2f} x, the share of SmolLM3's ablations and repairs"
        decision.figures.append(Figure(f"{hours}, trials too", plain(paid), formula))
        if answers.team < 2:
            decision.warnings.append(
                "One person is few: two or three can pretrain, says the playbook."
            )
    if answers.price is not None:
        formula = f"{plain(paid)} {hours} x {answers.price:g}"
        cost = Figure("cost", plain(paid * answers.price), formula)
        decision.figures.append(cost)
    if time.days > 7 * answers.weeks:
        needed = time.days / 7 / answers.weeks * answers.devices
        decision.warnings.append(
            f"The deadline is impossible: {duration(time.days)} of computing in {answers.weeks:g} "
            f"weeks. It takes {needed:,.0f} such devices, fewer tokens or a smaller model."
        )
    return time


def _data(answers: Answers, recipe: Recipe, decision: Decision) -> None:
    if answers.unique_tokens is None:
        return
    epochs = recipe.tokens / answers.unique_tokens
    decision.figures.append(Figure("epochs", f"{epochs:.3g}", "tokens / unique tokens"))
    if epochs > compute.MOST_EPOCHS:
        decision.warnings.append(
            f"The data would be read {epochs:.3g} times; beyond {compute.MOST_EPOCHS:g} it gains "
            "little (Muennighoff et al. 2023). Find more, or train on "
            f"{short(compute.MOST_EPOCHS * answers.unique_tokens)} tokens."
        )


def _checkpoints(
    answers: Answers, recipe: Recipe, days: float, decision: Decision, chosen: Option
) -> None:
    every, bandwidth = answers.checkpoint_hours, answers.store_bandwidth
    writers = chosen.sharding.shard_size * chosen.sharding.tensor_parallel_size
    traffic = compute.checkpoint_traffic(
        recipe.config, days, every, bandwidth, DISK_BANDWIDTH, writers
    )
    upload = duration(traffic.upload_seconds / 86400)
    decision.figures += [
        Figure(
            "checkpoint",
            f"{traffic.bytes / 1e9:.3g} GB, {traffic.count:,} in all",
            f"{compute.CHECKPOINT_BYTES} bytes a parameter: weight, two moments; every {every:g} h",
        ),
        Figure(
            "upload",
            f"{upload}, {traffic.bandwidth_share:.2%} of the time",
            f"bytes / {bandwidth / 1e9:g} GB/s, while training goes on",
        ),
        Figure(
            "stall",
            f"{traffic.stall_share:.2%} of the time",
            f"bytes / {writers} processes / {DISK_BANDWIDTH / 1e9:g} GB/s of disk / interval",
        ),
    ]
    if traffic.bandwidth_share > 1:
        decision.warnings.append(
            f"The store cannot keep up: an upload takes {upload}, and a checkpoint comes every "
            f"{every:g} h. Save less often, or find a faster way to the store."
        )


def _start(answers: Answers, recipe: Recipe, decision: Decision, chosen: Option) -> None:
    """The files and the flags."""
    flags, strategy, sharding = decision.flags, chosen.strategy, chosen.sharding
    decision.configs = list(recipe.files)
    if answers.on_gpu or answers.devices > 1:
        name = "gpu" if strategy == "single" else strategy
        decision.configs.append(f"configs/hardware/{name}.yaml")
        flags["--trainer.devices"] = str(min(answers.devices, GPUS_PER_NODE))
        flags["--trainer.num_nodes"] = str(-(-answers.devices // GPUS_PER_NODE))
    if sharding.strategy == "fsdp":
        # Over what a recipe says of its own GPUs.
        shard = str(sharding.shard_size) if strategy == "hsdp" else "null"
        tensor = str(sharding.tensor_parallel_size)
        flags["--trainer.strategy.init_args.tensor_parallel_size"] = tensor
        flags["--trainer.strategy.init_args.shard_size"] = shard
    elif answers.model == "3b" and not answers.on_gpu:
        flags |= {"--trainer.accelerator": "cpu", "--trainer.strategy": "auto"}
        flags |= {"--trainer.devices": "1", "--trainer.num_nodes": "1"}
        flags |= {"--model.attention": "sdpa"}
    elif answers.model == "3b" and strategy == "single":
        flags["--trainer.strategy"] = "auto"
    if chosen.work.checkpointing != "none":
        flags["--model.activation_checkpointing"] = chosen.work.checkpointing
    tokens, context, micro, batch = recipe.shipped
    if recipe.context != context:
        flags["--data.context_length"] = str(recipe.context)
    if chosen.batch != batch:
        flags["--data.global_batch_tokens"] = str(chosen.batch)
    if chosen.work.tokens != micro or strategy == "cpu_2":
        flags["--data.micro_batch_tokens"] = str(chosen.work.tokens)
    if chosen.batch != batch or recipe.tokens != tokens:
        steps = round(recipe.tokens * recipe.first_stage / chosen.batch)
        flags["--trainer.max_steps"] = str(max(steps, 1))
        last = MODELS.get(answers.model, MODELS["nano"])[1]
        decision.warnings.append(
            f"The later stages, up to {last}, begin and end at steps of their own; scale those too."
        )
    if answers.model != "3b" and recipe.tokens > MUCH:
        decision.warnings.append(
            f"{recipe.files[0]} is made for minutes on a laptop: give its run a larger batch than "
            f"{chosen.batch:,} tokens (--data.global_batch_tokens), a learning rate to match "
            "(--model.optimizer.learning_rate), and your own mixture of data."
        )


def plain(number: float) -> str:
    """A number of three digits or more, without an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def short(number: float) -> str:
    """A number with a suffix, as 3.08B."""
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.3g}{suffix}"
    return f"{number:.3g}"


def duration(days: float) -> str:
    """A time in the unit that suits it."""
    for name, unit in (("days", 1), ("h", 24), ("min", 24 * 60)):
        if days * unit >= 2:
            return f"{plain(days * unit)} {name}"
    return f"{days * 86400:.2g} s"
