"""What the checklist asks for, and the models and devices that an answer can name."""

from dataclasses import dataclass
from typing import Any, Literal

from smol.config import load_config
from smol.errors import UserError, nearest
from smol.model.config import DecoderConfig
from smol.model.peak_flops import PEAK_FLOPS

MODELS = {  # files of the first stage, and of the last one before long contexts
    "nano": (["configs/stage1.yaml"], "configs/stage3.yaml"),
    "135m": (
        ["configs/stage1.yaml", "configs/model/smollm2_135m.yaml"],
        "configs/stage3.yaml",
    ),
    "3b": (["configs/smollm3_3b/stage1.yaml"], "configs/smollm3_3b/stage3.yaml"),
}
DEVICES = {  # name in the table of peaks, GiB of memory
    "a100": ("A100-SXM4-80GB", 80),
    "a100-40gb": ("A100-SXM4-40GB", 40),
    "b200": ("B200", 180),
    "h100": ("H100 80GB HBM3", 80),
    "h200": ("H200", 141),
    "l40s": ("L40S", 48),
    "rtx3090": ("GeForce RTX 3090", 24),
    "rtx4090": ("GeForce RTX 4090", 24),
    "rtx5090": ("GeForce RTX 5090", 32),
}
CPU_SPEED = 250e9
"""Operations per second in training the nano decoder on two cores of a Xeon with AMX (README)."""
CPU_MEMORY = 16  # GiB, of all processes
GPUS_PER_NODE = 8
USABLE = 0.92  # of the memory; the rest goes to the framework, NCCL and fragmentation
GIB = 2**30

Tried = Literal["untried", "enough", "not_enough"]


@dataclass
class Answers:
    """Answers to the checklist. None leaves a number to the configuration of the model.

    Attributes:
        goal: What the model is for.
        prompting: Whether prompting a model that exists does.
        fine_tuning: Whether fine-tuning one does.
        deployment: On a device of its user's, or on servers.
        experience: What the team has trained: nothing, dense models, or others too.
        team: People.
        weeks: Until it has to be there.
        model: One of ``MODELS``, or a YAML file with ``model.init_args.decoder``.
        tokens: To train on.
        context: Tokens of a sequence.
        micro_batch_tokens: At most so many in one pass of a process.
        unique_tokens: Of the data, counted once.
        device: ``cpu`` or one of ``DEVICES``.
        devices: How many.
        memory_gib: Of one GPU, or of the machine without one.
        mfu: Model-FLOPs utilisation that training reaches on a GPU, by PaLM's convention.
        price: Of an hour of one device, in any currency.
        checkpoint_hours: Between two checkpoints.
        store_bandwidth: Bytes per second to the store.
    """

    goal: Literal["learn", "research", "product", "open_source"] = "learn"
    prompting: Tried = "untried"
    fine_tuning: Tried = "untried"
    deployment: Literal["edge", "server"] = "edge"
    experience: Literal["first", "dense", "expert"] = "first"
    team: int = 2
    weeks: float = 12.0
    model: str = "nano"
    tokens: float | None = None
    context: int | None = None
    micro_batch_tokens: int | None = None
    unique_tokens: float | None = None
    device: str = "cpu"
    devices: int = 1
    memory_gib: float | None = None
    mfu: float = 0.3
    price: float | None = None
    checkpoint_hours: float = 2.0
    store_bandwidth: float = 1e9

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UserError: Naming the answer.
        """
        if self.on_gpu and self.device not in DEVICES:
            raise UserError(
                f"device {self.device!r} is unknown; expected cpu, {', '.join(DEVICES)}."
                f"{nearest(self.device, DEVICES)}"
            )
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not value > 0:
                raise UserError(f"{name} is {value:g}; expected more than 0")
        if self.mfu > 1:
            raise UserError(f"mfu is {self.mfu:g}; expected a share of the peak, such as 0.3")
        if self.devices > GPUS_PER_NODE and self.devices % GPUS_PER_NODE:
            raise UserError(
                f"devices is {self.devices}; expected up to {GPUS_PER_NODE}, or whole nodes of "
                f"{GPUS_PER_NODE}"
            )

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device != "cpu"

    @property
    def speed(self) -> float:
        """Operations per second that one device reaches in training."""
        if not self.on_gpu:
            return CPU_SPEED / self.devices  # processes share the machine
        return PEAK_FLOPS[DEVICES[self.device][0]] * self.mfu

    @property
    def room(self) -> float:
        """Bytes of memory that one process can use."""
        if not self.on_gpu:
            return (self.memory_gib or CPU_MEMORY) * GIB * USABLE / self.devices
        return (self.memory_gib or DEVICES[self.device][1]) * GIB * USABLE


@dataclass(frozen=True)
class Recipe:
    """What the configuration of a model says, with the answers over it.

    Attributes:
        files: Of the first stage.
        config: Shape of the decoder.
        tokens: Of all stages before long contexts.
        first_stage: Share of the tokens that the first stage has.
        context: Tokens of a sequence.
        micro_batch_tokens: Of one pass of a process, at most.
        batch: Tokens of an optimiser step.
        shipped: What the files say: tokens, context, micro_batch_tokens, batch.
    """

    files: list[str]
    config: DecoderConfig
    tokens: float
    first_stage: float
    context: int
    micro_batch_tokens: int
    batch: int
    shipped: tuple[float, int, int, int]


def recipe(answers: Answers) -> Recipe:
    """Read the configuration of the model that the answers name.

    Raises:
        UserError: There is no such model, or its file does not describe one.
    """
    name = answers.model
    files, last = MODELS.get(name, ([*MODELS["nano"][0], name], MODELS["nano"][1]))
    if name not in MODELS and not name.endswith((".yaml", ".yml")):
        raise UserError(
            f"model {name!r} is unknown; expected {', '.join(MODELS)} or a YAML file like "
            f"configs/model/smollm2_135m.yaml.{nearest(name, MODELS)}"
        )
    if name not in MODELS and "decoder" not in _model(load_config([name])):
        raise UserError(
            f"{name} describes no model; expected model.init_args.decoder, as in "
            "configs/model/smollm2_135m.yaml"
        )
    values, end = load_config(files), load_config([last])
    data, context = values["data"]["init_args"], values["vars"]["context"]
    batch, micro = data["global_batch_tokens"], data["micro_batch_tokens"]
    steps, all_steps = values["trainer"]["max_steps"], end["trainer"]["max_steps"]
    tokens = all_steps * batch
    own_context = answers.context or context
    return Recipe(
        files=files,
        config=_decoder(name, values),
        tokens=answers.tokens or tokens,
        first_stage=steps / all_steps,
        context=own_context,
        micro_batch_tokens=max(answers.micro_batch_tokens or micro, own_context),
        batch=max(batch, own_context),
        shipped=(tokens, context, micro, batch),
    )


def _model(values: dict[str, Any]) -> dict[str, Any]:
    return (values.get("model") or {}).get("init_args") or {}


def _decoder(name: str, values: dict[str, Any]) -> DecoderConfig:
    shape = dict(_model(values)["decoder"])
    if shape["vocab_size"] == "${vars.vocab_size}":
        shape["vocab_size"] = values["vars"]["vocab_size"]
    try:
        return DecoderConfig(**shape)
    except TypeError as error:
        wrong = str(error).partition(") ")[2] or str(error)
        raise UserError(f"{name}: model.init_args.decoder {wrong}") from None
