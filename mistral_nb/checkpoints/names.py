"""The tensors of a Llama-family model: their names in Mistral's files and in Hugging Face's, and their shapes."""

from __future__ import annotations

from collections.abc import Iterator

from mistral_nb.checkpoints.args import ModelArgs

__all__ = ["expected_tensors", "hugging_face_name"]

_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def hugging_face_name(name: str) -> str:
    """`layers.3.attention.wq.weight` -> `model.layers.3.self_attn.q_proj.weight`; `name` is one of the model's."""
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{_LAYER[part]}.weight"


def expected_tensors(args: ModelArgs) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Mistral's name and the shape, matrices [out, in], of every tensor that such a model has."""
    yield "tok_embeddings.weight", (args.vocab_size, args.dim)
    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (args.dim,),
        "attention.wq": (q_dim, args.dim),
        "attention.wk": (kv_dim, args.dim),
        "attention.wv": (kv_dim, args.dim),
        "attention.wo": (args.dim, q_dim),
        "ffn_norm": (args.dim,),
        "feed_forward.w1": (args.hidden_dim, args.dim),
        "feed_forward.w2": (args.dim, args.hidden_dim),
        "feed_forward.w3": (args.hidden_dim, args.dim),
    }
    for layer in range(args.n_layers):
        for part, shape in shapes.items():
            yield f"layers.{layer}.{part}.weight", shape
    yield "norm.weight", (args.dim,)
    if not args.tied_embeddings:
        yield "output.weight", (args.vocab_size, args.dim)
