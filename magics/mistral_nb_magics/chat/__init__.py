"""The chat widget: `mistral_nb.Chat` and `%mistral chat`."""
