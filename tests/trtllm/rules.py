"""What a run of a TensorRT-LLM engine must keep to, and the error that names the rule it broke."""

from __future__ import annotations

from enum import StrEnum


class Rule(StrEnum):
    """One rule each. TensorRT-LLM checks a few of them; breaking another gives wrong tokens, or a
    fault of the device, without a message."""

    STREAM = "the stream is a handle, an integer"
    UNKNOWN_TENSOR = "no tensor is bound that the engine does not have"
    MISSING_TENSOR = "every input and output of the engine is bound"
    TENSOR = "inputs and outputs are torch tensors, contiguous, in memory the engine can reach"
    DTYPE = "a tensor has the engine's dtype"
    STALE_SHAPE = "shapes are set before each run whose shapes differ"
    SYMBOLS = "dimensions of one name have one size in all tensors"
    ROOM = "an output has room for what the engine writes"
    OUTPUT_OVERLAP = "outputs overlap neither inputs nor the KV pool"
    PLACEMENT = "device memory and host memory are apart, and memory does not change sides"
    INPUT_CHANGED = "inputs stay as they are until the engine has read them"
    DEVICE_COPY = "a device tensor holds what its host twin holds"
    REQUEST_TYPES = "request types are 0 (context) or 1 (generation)"
    CONTEXT_FIRST = "context requests come before generation requests"
    CONTEXT_LENGTH = "a context request has at least one token, a generation request its prompt"
    NUM_TOKENS = "the tokens are those of all chunks and one per generation request"
    LAST_TOKEN_IDS = "last_token_ids are inclusive prefix sums of the new tokens"
    SEQUENCE_LENGTH = "sequence_length counts the cached tokens and the new ones"
    PAST_LENGTH = "past lengths include a context's chunk, and exclude a generation's token"
    PAGED_CONTEXT = "a chunk after the first needs use_paged_context_fmha"
    POSITION_IDS = "position ids count a request's tokens from 0"
    TOKEN_IDS = "token ids lie in the vocabulary"
    POOL_POINTERS = "pool pointers are [address of KV memory, 0]"
    POOL_MAPPING = "the pool mapping is [0, layer] for every layer"
    TABLE_SIZE = "int32 can index the block tables"
    NUM_BLOCKS = "a table has blocks for all tokens of its sequence"
    SECONDARY_POOL = "no offset has bit 31: blocks in use lie on the device"
    KEY_OFFSET = "a K offset is block * layers * 2"
    VALUE_OFFSET = "a V offset is its K offset + 1"
    BLOCK_RANGE = "offsets lie inside the pool"
    UNUSED_OFFSET = "entries behind a sequence's blocks are 0 or blocks of the pool"
    REPEATED_BLOCK = "a sequence has each of its blocks once"
    WRITTEN_BLOCK = "a block that is written in this step belongs to one sequence"
    SHARED_BLOCK = "a shared block has the same place in all its sequences"
    WINDOW = "attention windows hold the longest sequence"
    CACHE_INDIRECTION = "cache_indirection is 0, for the batch, and as wide as the window"
    SINK = "there are no sink tokens"
    PERF_KNOBS = "perf knobs are -1, the first two -1, 0 or 1"
    CONTEXT_PROGRESS = "host_context_progress is a null pointer"
    ALL_REDUCE = "the all-reduce workspace is allocate_workspace's, its buffers kept"


class RuleBroken(Exception):
    """A call that TensorRT-LLM would refuse, or answer with garbage.

    Neither a RuntimeError nor a ValueError: an engine that turns those into failed steps must not
    hide this one.
    """

    def __init__(self, rule: Rule, found: str) -> None:
        super().__init__(f"{rule}: {found}")
        self.rule = rule
