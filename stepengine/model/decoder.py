"""One decoder for four families: what differs between them is a bias, a norm and the numbers of the config."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stepengine.model import ops
from stepengine.model.config import ModelConfig


class TokenBatch(Protocol):
    """What the decoder itself reads of a batch; the rest is for the attention backend."""

    ids: Tensor  # token ids, int32 [T]
    positions: Tensor  # position of each token in its own sequence, int32 [T]


class Attention(Protocol):
    """What the decoder asks of an attention backend."""

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        """Store k and v [T, Hk, D], attend with q [T, Hq, D]: [T, Hq, D]. Rows of all three may be strided."""
        ...


class Layer(nn.Module):
    """One decoder layer; q, k and v come of one matrix product, gate and up of another."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index, self.eps = index, config.rms_norm_eps
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        hidden, q_width = config.hidden_size, config.num_heads * config.head_dim
        heads = config.num_heads + 2 * config.num_kv_heads
        self.input_norm = nn.Parameter(torch.empty(hidden))
        self.qkv = nn.Linear(hidden, heads * config.head_dim, bias=config.qkv_bias)  # rows: q heads, k heads, v heads
        self.q_norm = nn.Parameter(torch.empty(config.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.empty(config.head_dim)) if config.qk_norm else None
        self.o = nn.Linear(q_width, hidden, bias=False)
        self.post_norm = nn.Parameter(torch.empty(hidden))
        self.gate_up = nn.Linear(hidden, 2 * config.intermediate_size, bias=False)  # rows: gate, up
        self.down = nn.Linear(config.intermediate_size, hidden, bias=False)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, batch: TokenBatch, attention: Attention
    ) -> tuple[Tensor, Tensor]:
        """x and residual [T, hidden], cos and sin [T, D] -> the same pair; their sum is the residual stream.

        The sum is left to the next norm, which reads it anyway. The first layer's residual is None.
        """
        if residual is None:
            x, residual = ops.rms_norm(x, self.input_norm, self.eps), x
        else:
            x, residual = ops.add_rms_norm(x, residual, self.input_norm, self.eps)
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [T, Hq + 2 * Hk, D]
        qk, v = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = ops.norm_rotate(qk, self.num_heads, self.q_norm, self.k_norm, self.eps, cos, sin)
        else:
            q, k = ops.rotate(qk, cos, sin).split((self.num_heads, self.num_kv_heads), dim=1)
        x = self.o(attention.forward(self.index, q, k, v, batch).flatten(1))
        x, residual = ops.add_rms_norm(x, residual, self.post_norm, self.eps)
        return self.down(ops.silu_mul(self.gate_up(x))), residual


class Decoder(nn.Module):
    """A decoder whose weights are allocated but not set; `loader.load_decoder` fills them.

    `max_len` (tokens) is the longest sequence that will be run: one more than the largest position.
    """

    cos: Tensor  # fp32 [max_len, D]
    sin: Tensor  # fp32 [max_len, D]

    def __init__(
        self, config: ModelConfig, device: torch.device | str, dtype: torch.dtype, max_len: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):  # nn.Linear would first fill its weights with random numbers
            self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
            self.norm = nn.Parameter(torch.empty(config.hidden_size))
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.to(dtype).allocate(device, max_len)

    def allocate(self, device: torch.device | str, max_len: int | None = None) -> None:
        """Give all weights memory on `device`, for what is in it now; what they were is lost."""
        config = self.config
        if config.tie_word_embeddings:
            del self.head.weight  # never allocate it a second time
        self.to_empty(device=device).requires_grad_(False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight
        cos, sin = ops.rope_tables(config, max_len or config.max_position_embeddings, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, batch: TokenBatch, attention: Attention) -> Tensor:
        """Hidden states after the final norm, [T, hidden], of the batch's T tokens. Call in inference mode."""
        x: Tensor = self.embed(batch.ids)
        cos = self.cos.index_select(0, batch.positions).to(x.dtype)  # once a step, not once a layer
        sin = self.sin.index_select(0, batch.positions).to(x.dtype)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, cos, sin, batch, attention)
        assert residual is not None  # num_layers is at least 1
        return ops.add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, vocab] of R rows of `forward`'s result."""
        logits: Tensor = self.head(hidden)
        return logits
