"""Names of tokenizer files: which there are, and which of them each class of transformers reads.

Source: ``vocab_files_names`` of every tokenizer class of huggingface/transformers 5.23; a test compares the table with them.
"""

import re
from types import MappingProxyType

VOCABULARIES = MappingProxyType(
    {
        name: tuple(files.split())
        for files, names in {
            "bpe.codes vocab.txt": "Bertweet Phobert",
            "byte_maps.json": "MyT5",
            "dict.txt sentencepiece.bpe.model": "Bartpho",
            "emoji.json vocab.txt": "GPTNeoXJapanese",
            "entity_vocab.json merges.txt vocab.json": "Luke",
            "entity_vocab.json sentencepiece.bpe.model": "MLuke",
            "merges.txt normalizer.json vocab.json": "Whisper",
            "merges.txt vocab-src.json vocab-tgt.json": "FSMT",
            "merges.txt vocab.json": "BioGpt BlenderbotSmall Blenderbot CLIP CTRL Clvp CodeGen Cohere Deberta Flaubert GPT2 "
            "GPTNeoX Herbert LayoutLMv3 MarkupLM Nougat OpenAIGPT Qwen2 Roberta XLM",
            "prophetnet.tokenizer": "ProphetNet",
            "sentencepiece.bpe.model": "Barthez Camembert LayoutXLM MBart50 MBart Nllb PLBart SeamlessM4T XLMRoberta",
            "sentencepiece.bpe.model vocab.json": "M2M100 Speech2Text",
            "sentencepiece.model": "RemBert",
            "source.spm target.spm target_vocab.json vocab.json": "Marian",
            "spiece.model": "Albert BertGeneration BigBird FNet GPTSw3 Lasr Pegasus Reformer Siglip T5 Udop VideoPrism XLNet",
            "spiece.model tokenizer.model": "Cpm",
            "spiece.model vocab.txt": "BertJapanese",
            "spm.model": "DebertaV2",
            "spm_char.model": "SpeechT5",
            "tokenizer.model": "CodeLlama Llama Parakeet Qwen3_5 Tipsv2",
            "vocab.json": "FastSpeech2Conformer Mgpstr Vits Wav2Vec2CTC Wav2Vec2PhonemeCTC",
            "vocab.txt": "Bert ConvBert CpmAnt DPRContextEncoder DPRQuestionEncoder DPRReader DistilBert Esm Funnel LayoutLMv2 "
            "MPNet RoFormer Splinter Tapas",
            "vocab.txt word_pronunciation.json word_shape.json": "RoCBert",
        }.items()
        for name in names.split()
    }
)
"""Class without ``Tokenizer`` at its end -> the files of its vocabulary, of which it may need some only."""
JSON_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
SPECIAL_NAME, ADDED_NAME = "special_tokens_map.json", "added_tokens.json"
TEMPLATES_NAME = "additional_chat_templates"
# What every class reads; what some do (versions of tokenizer.json, other makes of vocabularies); Microsoft's for v1.
_OTHERS = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)|"
    r"tokenizer\..+\.json|[^/]*tekken[^/]*\.json|tiktoken\.model|tokenizer\.model\.[^/]+|bpe_encoder\.bin"
)
_ALL = frozenset(file for files in VOCABULARIES.values() for file in files)
_PAIR = ("merges.txt", "vocab.json")


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name is part of a tokenizer."""
    return name in _ALL or _OTHERS.fullmatch(name) is not None


def stem_of(class_name: str) -> str:
    """``DebertaV2`` of ``DebertaV2TokenizerFast``."""
    return re.sub(r"Tokenizer(Fast|Legacy)?$", "", class_name)


def missing_files(class_name: str, present: set[str]) -> str:
    """What is said of the vocabulary files that a class reads and that are not there; empty where it can do."""
    needed = VOCABULARIES.get(stem_of(class_name), ())
    absent = [name for name in needed if name not in present]
    if JSON_NAME in present or not absent:
        return ""
    if len(absent) == len(needed) or set(absent) & set(_PAIR):
        return f"{class_name} cannot be loaded: {' and '.join(absent)} (or {JSON_NAME}) is not in the source"
    return f"{' and '.join(absent)}, which some tokenizers of {class_name} have, is not in the source"
