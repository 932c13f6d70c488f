"""Peak memory of a training process, by formula.

Tensors are counted as the decoder, its loss and AdamW make them: float32 weights, gradients and two
moments (the 16 bytes a parameter of Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054), the
copies in which products are computed, and what the backward pass waits for (in the manner of
Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198; here no attention scores are kept, and
the head goes through the vocabulary in chunks). All at the worst moment of a step, which is not the
same one for all runs. Left out are the framework itself, fragmentation, and the buffers of the
communication library; ``benchmarks/memory_plan.py`` compares with what is measured.

Blocks compiled by ``torch.compile`` keep less, because it computes cheap steps again.
"""

from dataclasses import dataclass
from typing import Literal

from smol.model.config import DecoderConfig
from smol.model.flops import num_matmul_parameters, num_parameters

FLOAT = 4  # bytes
BATCH = 28  # bytes of a token in the batch: input, target and position int64, document int32
# Those of the loss, which a test compares: planning is to start without torch.
TILE_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
SMALLEST_CHUNK = 512


@dataclass(frozen=True)
class Sharding:
    """How parameters are spread over processes.

    Attributes:
        strategy: ``single``, ``ddp`` (each process has all parameters) or ``fsdp`` (FSDP2).
        shard_size: Data-parallel processes that share a copy of the parameters, under ``fsdp``.
        tensor_parallel_size: Processes that compute each block together, under ``fsdp``.
    """

    strategy: Literal["single", "ddp", "fsdp"] = "single"
    shard_size: int = 1
    tensor_parallel_size: int = 1


@dataclass(frozen=True)
class Work:
    """What a process does in one pass.

    Attributes:
        tokens: Of a micro-batch.
        accumulation: Micro-batches of an optimiser step.
        precision: ``bf16-mixed`` or ``32-true``.
        checkpointing: ``none``, ``selective`` or ``full`` activation checkpointing.
        device: ``cuda``, where norms are fused, or ``cpu``, where they are not.
    """

    tokens: int
    accumulation: int = 1
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed"
    checkpointing: Literal["none", "selective", "full"] = "none"
    device: Literal["cuda", "cpu"] = "cuda"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process at the worst moment of a step.

    Attributes:
        moment: Which moment that is.
        parts: Bytes by what they hold.
    """

    moment: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Sum of all parts, in bytes."""
        return sum(self.parts.values())


def training_memory(config: DecoderConfig, sharding: Sharding, work: Work) -> MemoryPlan:
    """Plan the memory of a training process with AdamW, from the second step on.

    Args:
        config: Shape of the decoder.
        sharding: How it is spread.
        work: What the process computes.

    Returns:
        The worst of four moments: the loss at the end of the forward pass (the gradients of the
        step before are still there), the loss of the backward pass, its first block, its end.
    """
    return max(_moments(config, sharding, work), key=lambda plan: plan.total)


def _moments(config: DecoderConfig, sharding: Sharding, work: Work) -> list[MemoryPlan]:
    tensor, copies = sharding.tensor_parallel_size, sharding.shard_size
    compute = 2 if work.precision == "bf16-mixed" else FLOAT
    fsdp = sharding.strategy == "fsdp"
    weight = compute if fsdp else FLOAT  # bytes of the weights that the forward pass sees
    own = FLOAT * num_parameters(config) / tensor / copies
    embedding = config.vocab_size * config.hidden_size / tensor
    blocks = num_matmul_parameters(config) / tensor - embedding
    block = blocks / config.num_layers
    roots = 1 if config.tie_embeddings else 2

    held = {"parameters": own, "moments": 2 * own}
    if sharding.strategy == "ddp":
        held["gradient buckets"] = own
    if fsdp:
        # The root stays gathered; of the blocks one computes and the next one arrives.
        held["gathered parameters"] = compute * (roots * embedding + 2 * block)
        cast = 0.0
    else:
        cast = compute * blocks if compute < FLOAT else 0.0
    gradients = {"gradients": own}
    accumulated = gradients if work.accumulation > 1 else {}

    kept, last_norm, again = _activations(config, sharding, work, compute)
    activations = {"activations": kept + last_norm, "batch": BATCH * work.tokens}
    head_tiles, rows = _head_tiles(config, work, compute, tensor)
    head_gradient = weight * embedding
    hidden = FLOAT * work.tokens * config.hidden_size
    # Blocks that are computed again make their copies again, too.
    keeps = work.checkpointing == "none"
    cast_by_loss, cast_by_block = (cast, cast) if keeps else (0.0, cast / config.num_layers)
    transit = (compute + FLOAT) * block if fsdp else 0.0  # gradients on their way to their shards

    # A tied matrix has two gradients until they are added up; the sum takes the place of one.
    last = embedding * FLOAT * ((work.accumulation > 1) + config.tie_embeddings)
    if fsdp:
        last = embedding * (compute * config.tie_embeddings + FLOAT * roots)
    product = work.tokens * config.intermediate_size / tensor
    return [
        MemoryPlan(
            "the loss, end of the forward pass",
            held
            | gradients
            | {"bfloat16 copies": cast_by_loss}
            | activations
            | {"loss in chunks": head_tiles},
        ),
        MemoryPlan(
            "the loss, beginning of the backward pass",
            held
            | accumulated
            | {"bfloat16 copies": cast_by_loss}
            | activations
            | {"loss in chunks": head_tiles + rows + hidden, "gradient of the head": head_gradient},
        ),
        MemoryPlan(
            "the last block, in the backward pass",
            held
            | accumulated
            | {"bfloat16 copies": cast_by_block}
            | {
                "activations": kept,
                "batch": BATCH * work.tokens,
                "activations computed again": again,
                "gradients of activations": 2 * compute * product + hidden,
                "gradient of the head": head_gradient,
                "gradients on their way": transit,
            },
        ),
        MemoryPlan(
            "the embedding, end of the backward pass",
            held | gradients | {"gradient of the embedding": last, "batch": BATCH * work.tokens},
        ),
    ]


def _activations(
    config: DecoderConfig, sharding: Sharding, work: Work, compute: int
) -> tuple[float, float, float]:
    """Bytes that wait for the backward pass in all blocks, those of the last norm, and those that a
    block then computes again."""
    tensor = sharding.tensor_parallel_size
    stream = compute if sharding.strategy == "fsdp" else FLOAT  # of the residual stream
    cpu = work.device == "cpu"
    queries = config.num_heads * config.head_dim
    pairs = config.num_kv_heads * config.head_dim * 2
    width, inner = config.hidden_size, config.intermediate_size

    # A norm keeps what it is given; where it is made of simple operations, also what these give.
    simple = FLOAT * width * (1 + (stream < FLOAT)) if cpu else 0
    norm = stream * width + simple + FLOAT
    attention = compute * (2 * queries + pairs) + FLOAT * config.num_heads
    per_layer = 2 * norm / tensor + 2 * compute * width + (attention + 4 * compute * inner) / tensor

    again = 0.0
    if work.checkpointing != "none":
        entry = stream * width / tensor
        per_layer, again = entry, per_layer - entry
    if work.checkpointing == "selective":
        used = compute * (2 * inner + queries) + FLOAT * config.num_heads
        per_layer += (used + compute * (queries + pairs + 2 * width)) / tensor
        again -= used / tensor  # what was kept is not made again
    shared = 2 * compute * config.head_dim  # cosines and sines of all layers
    last = norm / tensor + compute * width + 3 * FLOAT
    kept = config.num_layers * per_layer + shared
    return work.tokens * kept, work.tokens * last, work.tokens * again


def _head_tiles(
    config: DecoderConfig, work: Work, compute: int, tensor: int
) -> tuple[float, float]:
    """Bytes of the logits in work with what makes them, and of their share of a gradient."""
    chunk = max(TILE_ELEMENTS[work.device] // work.tokens, SMALLEST_CHUNK)
    chunk = min(chunk, config.vocab_size // tensor)
    logits = work.tokens * chunk
    size, rows = compute * logits, compute * chunk * config.hidden_size
    if compute < FLOAT:
        size += FLOAT * logits * (2 if work.device == "cpu" else 1) + rows
    return size, rows
