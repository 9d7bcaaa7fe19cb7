"""posttrain: post-training of language models on one engine."""
