"""How the shipped pairs are made and measured: their questions, tokenizer and targets."""
