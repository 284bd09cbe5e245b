from tests.small_corpus import other_tokenizer, texts, token_file, tokenizer

__all__ = ["other_tokenizer", "texts", "token_file", "tokenizer"]
