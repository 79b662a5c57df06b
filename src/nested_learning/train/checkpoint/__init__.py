"""Self-describing checkpoints: written by any number of processes, read by any other number.

A checkpoint of a run is a folder `checkpoints/step_00000100/`:

    __0_0.distcp … .metadata   weights and optimizer state (torch.distributed.checkpoint), a file per rank
    run.pt                     step, configuration, tokenizer, position in the data, hash of the text, metrics
    random_00000.pt …          random states of every rank
    manifest.json              size and SHA-256 of all of these

`nl export` turns one into a single safetensors file, with configuration and tokenizer in its header.

Nothing in a checkpoint is run when it is read: what is pickled is read by unpicklers that know tensors and
plain values only.
"""

from nested_learning.train.checkpoint.errors import CheckpointError
from nested_learning.train.checkpoint.export import export_checkpoint
from nested_learning.train.checkpoint.manifest import verify
from nested_learning.train.checkpoint.read import (
    load_checkpoint,
    put_weights,
    read_checkpoint,
    read_description,
)
from nested_learning.train.checkpoint.run_file import saved_config, saved_tokenizer
from nested_learning.train.checkpoint.store import CheckpointStore, find_checkpoint, write_atomic

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "export_checkpoint",
    "find_checkpoint",
    "load_checkpoint",
    "put_weights",
    "read_checkpoint",
    "read_description",
    "saved_config",
    "saved_tokenizer",
    "verify",
    "write_atomic",
]
