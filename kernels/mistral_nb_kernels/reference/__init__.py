"""The one torch reference of each op: the CPU path, the oracle of the tests and the baseline of the benchmarks.

Shapes use `n` for rows (tokens of all sequences, one after another), `dim` for features, `hq` and `hkv` for query and
KV heads, `d` for the head dimension and `t` for the keys of one sequence. Every op works row by row: on the CPU what a
row gets is the same to the bit however many rows and threads there are (`linear` excepted where it goes through BLAS,
which chooses its order by the shape).
"""

from mistral_nb_kernels.reference.attention import (
    RopeScaling,
    attention,
    prefill_attention,
    rope,
    rope_prefill_attention,
    rope_table,
    rope_write,
)
from mistral_nb_kernels.reference.decode_attention import Decoding, decode_attention, rope_decode_attention
from mistral_nb_kernels.reference.layers import add_rms_norm, embedding, rms_norm, swiglu
from mistral_nb_kernels.reference.linear import (
    blocked_int8,
    linear,
    linear_int4_cpu,
    linear_int8,
    linear_int8_cpu,
    quantize_int8,
)
from mistral_nb_kernels.reference.lora import Adapting, lora_expand, lora_shrink
from mistral_nb_kernels.reference.sampling import philox, sample, sample_row, uniform

__all__ = [
    "Adapting",
    "Decoding",
    "RopeScaling",
    "add_rms_norm",
    "attention",
    "blocked_int8",
    "decode_attention",
    "embedding",
    "linear",
    "linear_int4_cpu",
    "linear_int8",
    "linear_int8_cpu",
    "lora_expand",
    "lora_shrink",
    "philox",
    "prefill_attention",
    "quantize_int8",
    "rms_norm",
    "rope",
    "rope_decode_attention",
    "rope_prefill_attention",
    "rope_table",
    "rope_write",
    "sample",
    "sample_row",
    "swiglu",
    "uniform",
]
