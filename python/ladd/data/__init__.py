"""Latents to train on: `ShardWriter` and `LatentShards` keep them on disk, `openmoji` draws the default model's pictures."""

from .shards import Batch, LatentShards, ShardWriter, identity

__all__ = ["Batch", "LatentShards", "ShardWriter", "identity"]
