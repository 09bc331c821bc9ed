"""The `%mistral_bench` and `%%mistral_kernel` magics."""
