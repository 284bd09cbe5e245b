"""Keys of published configuration files that change nothing in a model.

Hugging Face writes what any of its models could have, generation of text included, and what it was loaded with.
"""

BOOKKEEPING_KEYS = frozenset(
    """
    _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    id2label is_decoder is_encoder_decoder label2id legacy length_penalty mask_token_id max_length min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores prefix pruned_heads remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sentence_transformers sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
    """.split()
)
"""Accepted by ``DebertaConfig.from_dict`` and left behind.

Source: huggingface/transformers configuration_utils.py, 4.0 to 5.23.
"""
