"""A decoder layer in two halves, and what is outside of the layers; models/transformer.py stacks
and scans them."""

from __future__ import annotations

from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from dcod_jax.models.config import ModelConfig
from dcod_jax.models.experts import Experts
from dcod_jax.models.layers import MLP, Attention, Embedding, norm

# Place of a norm in a block -> its name in GGUF files.
PLACES = {
    "before attention": "attn_norm",
    "after attention": "post_attention_norm",
    "before mlp": "ffn_norm",
    "after mlp": "post_ffw_norm",
}
_IN, _POST = "input_layernorm", "post_attention_layernorm"
_BEFORE_MLP, _AFTER_MLP = "pre_feedforward_layernorm", "post_feedforward_layernorm"
# Where a block has norms -> the attributes of PLACES, which are the names in HF files too.
NORMS: dict[str, tuple[str | None, ...]] = {
    "pre": (_IN, None, _POST, None),
    "pre_feedforward": (_IN, None, _BEFORE_MLP, None),
    "post": (None, _POST, None, _AFTER_MLP),
    "both": (_IN, _POST, _BEFORE_MLP, _AFTER_MLP),
    "glm4": (_IN, "post_self_attn_layernorm", _POST, "post_mlp_layernorm"),
}


class Block(nnx.Module):
    """One decoder layer, in two halves: before attention and after it.

    Names in files are those within the layer.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.self_attn = Attention(config, rngs=rngs)
        self.mlp = (Experts if config.mixture else MLP)(config, rngs=rngs)
        for name, gguf in zip(NORMS[config.norms], PLACES.values(), strict=True):
            if name is not None:
                setattr(self, name, norm(config, config.hidden_size, name, gguf))
        self.norms = config.norms
        self.residual_scale = config.residual_scale

    def _norm(self, place: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        name = dict(zip(PLACES, NORMS[self.norms], strict=True))[place]
        return x if name is None else getattr(self, name)(x)

    def _add(self, x: Float[Array, "B T D"], more: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x + more if self.residual_scale == 1 else x + more * self.residual_scale

    def project(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Float[Array, "B T P"], Float[Array, "B T P"]] | None,
    ) -> tuple[Float[Array, "B N T H"], Float[Array, "B G T H"], Float[Array, "B G T H"]]:
        """Query, key and value heads of the layer's input, rotated by `rope` if there is one."""
        return self.self_attn.project(self._norm("before attention", x), rope)

    def finish(
        self, x: Float[Array, "B T D"], mixed: Float[Array, "B N T H"]
    ) -> Float[Array, "B T D"]:
        """The layer's output, from its input and what attention mixed."""
        return self.apply_mlp(self.add_attention(x, mixed))

    def add_attention(
        self, x: Float[Array, "B T D"], mixed: Float[Array, "B N T H"]
    ) -> Float[Array, "B T D"]:
        """The layer's input plus what attention mixed."""
        return self._add(x, self._norm("after attention", self.self_attn.output(mixed)))

    def apply_mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """x plus what the MLP makes of it."""
        assert isinstance(self.mlp, MLP)
        return self._add(x, self._norm("after mlp", self.mlp(self._norm("before mlp", x))))

    def apply_experts(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], *, mesh: Mesh | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 R"]]:
        """apply_mlp of a mixture, and its routing."""
        assert isinstance(self.mlp, Experts)
        more, routing = self.mlp(self._norm("before mlp", x), real, mesh=mesh)
        return self._add(x, self._norm("after mlp", more)), routing


class Decoder(nnx.Module):
    """Everything outside the layers."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config, "model.embed_tokens", "token_embd", rngs=rngs)
        self.norm = norm(config, config.hidden_size, "model.norm", "output_norm")
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config, "lm_head", "output", rngs=rngs)
        self.logits_scale = config.logits_scale

    def final(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The normed hidden states, divided by logits_scale so that the head's logits are."""
        x = self.norm(x)
        return x if self.logits_scale == 1 else x / self.logits_scale
