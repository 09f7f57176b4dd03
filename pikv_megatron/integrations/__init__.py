"""The hosts of the cache: only modules here import Megatron-core, DeepSpeed or transformers, each of them one host."""
