"""Ways to spread a model over devices, and which of them have the memory."""

from dataclasses import dataclass

from smol.planning.answers import GPUS_PER_NODE, Answers, Recipe
from smol.planning.memory import MemoryPlan, Sharding, Work, training_memory


@dataclass(frozen=True)
class Option:
    """One way to spread the model, and the memory that a process then takes.

    Attributes:
        strategy: Name of the file in configs/hardware, or ``single``.
        sharding: What it does.
        work: Of a process: at most as many tokens at a time as the recipe says.
        batch: Tokens of an optimiser step; those of the recipe wherever the devices divide them.
        plan: Of the memory.
        fits: Whether the device has that memory.
    """

    strategy: str
    sharding: Sharding
    work: Work
    batch: int
    plan: MemoryPlan
    fits: bool

    @property
    def name(self) -> str:
        """Strategy and activation checkpointing."""
        kind = self.work.checkpointing
        return self.strategy if kind == "none" else f"{self.strategy}, {kind} checkpointing"


def options(answers: Answers, recipe: Recipe) -> list[Option]:
    """What can be done with the devices.

    Returns:
        First those that keep the recipe's batch; among these first what takes the least time.
    """
    made = [
        _option(answers, recipe, strategy, sharding, checkpointing)
        for checkpointing in ("none", "selective", "full")
        for strategy, sharding in _ways(answers, recipe).items()
    ]
    return sorted(made, key=lambda option: option.batch != recipe.batch)


def _ways(answers: Answers, recipe: Recipe) -> dict[str, Sharding]:
    n, config = answers.devices, recipe.config
    if n == 1:
        return {"single": Sharding()}
    if not answers.on_gpu:
        return {"cpu_2": Sharding("fsdp", n)}
    ways = {"ddp": Sharding("ddp")}
    if n > GPUS_PER_NODE:
        ways["hsdp"] = Sharding("fsdp", GPUS_PER_NODE)
    ways["fsdp"] = Sharding("fsdp", n)
    dealt = (n, config.num_heads, config.num_kv_heads, config.intermediate_size, config.vocab_size)
    if not any(number % 2 for number in dealt):
        ways["tensor_parallel"] = Sharding("fsdp", n // 2, 2)
    return ways


def _option(
    answers: Answers, recipe: Recipe, strategy: str, sharding: Sharding, checkpointing: str
) -> Option:
    replicas = answers.devices // sharding.tensor_parallel_size
    micro, batch = _batch(recipe, replicas)
    device = "cuda" if answers.on_gpu else "cpu"
    work = Work(micro, batch // micro // replicas, "bf16-mixed", checkpointing, device)
    plan = training_memory(recipe.config, sharding, work)
    return Option(strategy, sharding, work, batch, plan, plan.total <= answers.room)


def _batch(recipe: Recipe, replicas: int) -> tuple[int, int]:
    """Tokens of a micro-batch and of a step: the recipe's where they divide, else about as many."""
    context, most = recipe.context, recipe.micro_batch_tokens // recipe.context
    for rows in range(most, 0, -1):
        if recipe.batch % (rows * context * replicas) == 0:
            return rows * context, recipe.batch
    rows = min(most, max(recipe.batch // replicas // context, 1))
    unit = rows * context * replicas
    return rows * context, max(round(recipe.batch / unit), 1) * unit
