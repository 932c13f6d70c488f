"""nanochat's architecture, optimiser and schedules.

Written from facts, not from code, of github.com/karpathy/nanochat at
437943bd90a0e01c46afc445de4022ffeefaae9c: the architecture and the initial weights are those of
``nanochat/gpt.py``, the optimiser is that of ``nanochat/optim.py``, and how everything follows from
depth, batch and number of steps is that of ``scripts/base_train.py``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smol.data.batch import IGNORE

REFERENCE_BATCH, REFERENCE_WIDTH, REFERENCE_DEPTH = 2**19, 768, 12
WINDOW, GATE_CHANNELS, SOFTCAP, ROPE_BASE, SHARPNESS = 512, 12, 15.0, 100_000.0, 1.2
WEIGHT_DECAY, MATRIX_RATE, EMBEDDING_RATE, HEAD_RATE, SCALAR_RATE = 0.28, 0.02, 0.3, 0.008, 0.5
WARMUP_STEPS, WARMDOWN, FINAL = 40, 0.65, 0.05
MOMENTUM_STEPS, MOMENTA = 400, (0.85, 0.97, 0.90)  # at first, at the peak, at the end
# The polynomials of Polar Express for five iterations (arXiv 2505.16932).
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def norm(x: Tensor) -> Tensor:
    """RMSNorm without weights."""
    return F.rms_norm(x, (x.shape[-1],))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``(rows, time, heads, head_dim)``."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def is_near(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether a layer with a window sees a key, as FlexAttention asks for it."""
    return (query >= key) & (query - key <= WINDOW)


class Peer(nn.Module):
    """The model; matrices of a shape lie in one tensor, as its optimiser updates them.

    Args:
        vocab: Rows of the embedding.
        depth: Layers.
        width: Of the residual stream.
        head_dim: Of a head; there are as many key heads as query heads.
        context: Tokens of a row.
    """

    def __init__(self, vocab: int, depth: int, width: int, head_dim: int, context: int) -> None:
        super().__init__()
        self.depth, self.head_dim, self.context = depth, head_dim, context
        self.heads = width // head_dim
        # Every second layer, the last one among them, adds an embedding of the token to its values.
        self.with_values = [i for i in range(depth) if i % 2 == (depth - 1) % 2]
        # Three layers with a window, one without; the last one is without in any case.
        full = [i % 4 == 3 or i == depth - 1 for i in range(depth)]
        self.windows = [context if whole else min(WINDOW, context) for whole in full]
        pairs = len(self.with_values)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape))

        self.embedding, self.head = empty(vocab, width), empty(vocab, width)
        self.values = empty(pairs, vocab, width)
        self.square = empty(4 * depth, width, width)  # query, key, value and output, by layer
        self.up, self.down = empty(depth, 4 * width, width), empty(depth, width, 4 * width)
        self.gates = empty(pairs, self.heads, GATE_CHANNELS)
        self.residual, self.skip, self.backout = empty(depth), empty(depth), empty(1)
        turns = ROPE_BASE ** -(torch.arange(0, head_dim, 2, device="cpu") / head_dim)
        angles = torch.outer(torch.arange(context, device="cpu"), turns).unsqueeze(1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """First weights; outputs of attention and MLP begin with 0."""
        width, draw = self.embedding.shape[1], {"generator": generator}
        bound = math.sqrt(3 / width)
        self.embedding.normal_(0, 0.8, **draw)
        self.head.normal_(0, 0.001, **draw)
        self.values.normal_(0, 1, **draw)
        self.square.uniform_(-bound, bound, **draw)
        self.square[3::4] = 0
        self.up.uniform_(-0.4 * bound, 0.4 * bound, **draw)
        self.down.zero_()
        self.gates.uniform_(0, 0.02, **draw)
        self.residual.copy_(torch.linspace(1.15, 1.05, self.depth))
        self.skip.copy_(torch.linspace(0.20, 0.05, self.depth))
        self.backout.fill_(0.2)
        if self.backout.is_cuda and self.context > WINDOW:
            from torch.nn.attention.flex_attention import create_block_mask

            sizes = (None, None, self.context, self.context)
            self.near = create_block_mask(is_near, *sizes, device=self.backout.device)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each target in nats, ``(rows, time)`` float32.

        Args:
            tokens: ``(rows, time)`` int64.
            targets: ``(rows, time)`` int64; ``IGNORE`` has 0.
        """
        dtype = torch.bfloat16
        square = self.square.to(dtype).unbind()
        up, down = self.up.to(dtype).unbind(), self.down.to(dtype).unbind()
        gates, values = self.gates.to(dtype).unbind(), self.values.unbind()
        cos, sin = self.cos.to(dtype), self.sin.to(dtype)
        x = norm(F.embedding(tokens, self.embedding).to(dtype))
        first, middle = x, x
        for i in range(self.depth):
            x = self.residual[i] * x + self.skip[i] * first
            h = norm(x)
            wq, wk, wv, wo = square[4 * i : 4 * i + 4]
            q, k, v = (F.linear(h, w).unflatten(-1, (-1, self.head_dim)) for w in (wq, wk, wv))
            if i in self.with_values:
                n = self.with_values.index(i)
                added = F.embedding(tokens, values[n]).to(dtype).view_as(v)
                gate = 3 * torch.sigmoid(F.linear(h[..., :GATE_CHANNELS], gates[n]))
                v = v + gate.unsqueeze(-1) * added
            q, k = (SHARPNESS * norm(turn(part, cos, sin)) for part in (q, k))
            x = x + F.linear(self._attend(q, k, v, self.windows[i]), wo)
            x = x + F.linear(F.relu(F.linear(norm(x), up[i])).square(), down[i])
            if i == self.depth // 2:
                middle = x
        x = norm(x - self.backout.to(dtype) * middle)
        logits = F.linear(x, self.head.to(dtype)).float()
        logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
        nll = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
        )
        return nll.view_as(targets)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Causal attention over so many tokens; ``(rows, time, heads, head_dim)``, heads joined."""
        time = q.shape[1]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if window >= time:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif q.is_cuda:
            from torch.nn.attention.flex_attention import flex_attention

            mixed = flex_attention(q, k, v, block_mask=self.near)
        else:
            place = torch.arange(time, device=q.device)
            seen = is_near(place, place, place[:, None], place)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return mixed.transpose(1, 2).flatten(-2)


def orthogonal(update: Tensor) -> Tensor:
    """Muon's direction of matrices ``(n, rows, columns)``, float32, of norm ``sqrt(min)``."""
    x = update.bfloat16()
    rows, columns = x.shape[-2:]
    whole = x.float().norm(dim=(-2, -1), keepdim=True)
    each = x.float().norm(dim=-1, keepdim=True).clamp_min(1e-6)
    x = x * (whole / math.sqrt(rows) / each).bfloat16()  # rows of equal norm: arXiv 2603.28254
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    x = x.mT if rows > columns else x
    for a, b, c in POLAR:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    x = (x.mT if rows > columns else x).float()
    # To the norm that an exactly orthogonal matrix has: arXiv 2602.21545.
    return x * (math.sqrt(min(rows, columns)) / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6))


class NorMuon:
    """Muon with a second moment per neuron (arXiv 2510.05491) and cautious weight decay.

    Args:
        stacks: Matrices of a shape each, ``(n, rows, columns)``.
        compile: Whether the update is compiled.
    """

    def __init__(self, stacks: list[nn.Parameter], compile: bool) -> None:
        self.stacks = stacks
        self.moments = [torch.zeros_like(stack) for stack in stacks]
        wide = [stack.shape[-2] < stack.shape[-1] for stack in stacks]
        self.dims = [-2 if is_wide else -1 for is_wide in wide]
        pairs = zip(stacks, self.dims, strict=True)
        self.seconds = [torch.zeros_like(stack.mean(dim, keepdim=True)) for stack, dim in pairs]
        self.update = torch.compile(_update, dynamic=False) if compile else _update

    @torch.no_grad()
    def step(self, rate: float, momentum: float, decay: float) -> None:
        """Take a step, and forget the gradients."""
        for stack, moment, second, dim in zip(
            self.stacks, self.moments, self.seconds, self.dims, strict=True
        ):
            rows, columns = stack.shape[-2:]
            own = rate * math.sqrt(max(1, rows / columns))
            # As tensors, whose values the compiler does not specialise on.
            numbers = (torch.tensor(value, device=stack.device) for value in (own, momentum, decay))
            self.update(stack, stack.grad, moment, second, *numbers, dim)
            stack.grad = None


def _update(
    stack: Tensor,
    gradient: Tensor,
    moment: Tensor,
    second: Tensor,
    rate: Tensor,
    momentum: Tensor,
    decay: Tensor,
    dim: int,
) -> None:
    """One step of :class:`NorMuon`, in place."""
    moment.lerp_(gradient, 1 - momentum)
    step = orthogonal(gradient.lerp(moment, momentum))
    squares = step.square().mean(dim, keepdim=True)
    second.lerp_(squares, 0.1)
    scale = second.clamp_min(1e-10).rsqrt()
    # The norm stays; only its shares among the neurons change.
    before = squares.sum(dim=(-2, -1), keepdim=True)
    after = (squares * scale.square()).sum(dim=(-2, -1), keepdim=True).clamp_min(1e-20)
    step = step * (scale * (before / after).sqrt())
    stack.sub_(rate * step + rate * decay * stack * (step * stack >= 0))


def multiplier(step: int, steps: int) -> float:
    """Of the learning rates in a step, counted from 0."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    warmdown = round(WARMDOWN * steps)
    return FINAL + (1 - FINAL) * min(1, (steps - step) / max(1, warmdown))


def momentum(step: int, steps: int) -> float:
    """Of Muon in a step, counted from 0."""
    first, peak, last = MOMENTA
    if step < MOMENTUM_STEPS:
        return first + (peak - first) * step / MOMENTUM_STEPS
    warmdown = round(WARMDOWN * steps)
    return peak + (last - peak) * max(0, (step - steps + warmdown) / max(1, warmdown))


def horizon(vocab: int, depth: int, width: int, head_dim: int) -> int:
    """Parameters that nanochat's horizon is a multiple of: those of blocks and head."""
    gates = (depth + 1) // 2 * (width // head_dim) * GATE_CHANNELS
    return 12 * depth * width**2 + gates + vocab * width
