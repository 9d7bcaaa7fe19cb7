"""The main job in small: a tiny model, made and warmed up on the spot, learns by GRPO to write out its arithmetic."""
