// The longer docstrings of module.cc, in Google's style: what help() shows and the documentation pages are made of.
#pragma once

namespace thriftattn::python::docs {

inline constexpr char kAttention[] = R"(softmax(q k^T sm_scale) v, with k and v kept as `method` says.

q, k and v are tensors that speak DLPack, all on the CPU or all on one GPU, of float32, float16 or bfloat16 each. The
last axis is contiguous, all other strides are free. k and v are read in place; so is q, unless its sequences do not
follow one another at the stride of its rows, when it may be copied.

On a GPU the work goes to `stream`; q and p enter products in 16 bit; and the call waits for its end, because its cache
goes with it: KvCache does not wait.

Args:
    q: [b, s_q, h_q, d]; h_q is a multiple of h_kv.
    k: [b, s_kv, h_kv, d]; d is a multiple of 16 up to 256.
    v: [b, s_kv, h_kv, d_v]; d_v too.
    causal: Row r stands at position s_kv - s_q + r and sees no key after it.
    method: "name[:key=value,...]", see methods().
    phase: "prefill" selects pages per query head for blocks of 64 rows; "decode" per KV head for all rows, 16 at most.
    window: A row sees keys less than this many positions away alone; 0: all.
    sm_scale: None: 1 / sqrt(d).
    softcap: A scaled score s becomes softcap * tanh(s / softcap); 0: it stays.
    sinks: float32 [h_q], a logit per head that takes mass and brings no value.
    compute: "bfloat16" allows factors of a prefill's products to be rounded to it, where the machine gains by it.
    given: Promote exactly these pages instead of selecting.
    out: A writable tensor [b, s_q, h_q, d_v] to write to, of any of the three types.
    return_lse: Give the logarithm of each row's sum too.
    stats: Give Stats too; on a GPU in phase "decode" alone.
    stream: On a GPU: where to compute. None: PyTorch's or CuPy's current stream, for tensors of theirs; the legacy
        default stream for others, which their makers are asked to have them ready on. Or the address of a cudaStream_t,
        or a stream of PyTorch or CuPy, on which the tensors are then ready; they must live until its work is done.

Returns:
    out, of q's type, framework and device; followed, where asked for, by lse, float32 [b, s_q, h_q], natural logarithm, and by
    Stats. A row without a visible key gives out = 0, lse = -inf.

Raises:
    TypeError: An argument is no tensor, requires grad, or is of another type.
    ValueError: A shape, stride, word or number is wrong, `out` is read-only, tensors are on several devices or on one
        that this build or machine does not have, or k or v hold NaN, Inf or values beyond 65504. The message names it.
    NotImplementedError: No kernel serves the problem; the message has each one's reason.
)";

inline constexpr char kSelect[] = R"(The pages that attention() would promote, without the attention.

The arguments are those of attention().
)";

inline constexpr char kPlan[] = R"(What would run a problem on this machine, without running it.

Args:
    method: As in attention().
    phase: "decode" or "prefill".
    b: Sequences, 1 to 4096.
    s_q: Rows of a sequence, at most; 0: 1 in decode, s_kv in prefill.
    s_kv: Tokens of a sequence, at most.
    h_q: Query heads.
    h_kv: KV heads.
    d: Channels of a key head.
    d_v: Channels of a value head; 0: as d.
    causal: This and what follows is as in attention().
    threads: 0: those of the pool.
    device: "cpu", "cuda" or "cuda:1" and so on.

Raises:
    ValueError, NotImplementedError: As attention() does.
)";

inline constexpr char kQuantize[] = R"(x in FP4, in blocks along the last axis.

Bit for bit what the cache does to a block, its page scale and centring apart, wherever x is. A NaN makes its block NaN;
infinities saturate. On a GPU the work is queued on PyTorch's or CuPy's current stream, and x that is not contiguous is
copied by them first.

Args:
    x: [..., n] of float32, float16 or bfloat16; n is a multiple of the block.
    format: "nvfp4": E2M1 codes, a UE4M3 scale for every 16; "mxfp4": E2M1 codes, an E8M0 scale for every 32.
    scales: "6", or "4over6": the better of two scales for each block of nvfp4.

Returns:
    (codes, scales): uint8 [..., n / 2], two codes in a byte, the first in its low half, and uint8 [..., n / block],
    both where x is.
)";

inline constexpr char kDequantize[] = R"(float32 [..., n] of what quantize() gave, on the same device.

Args:
    codes: uint8 [..., n / 2].
    scales: uint8 [..., n / block].
    format: The one that quantize() was given.
)";

inline constexpr char kCache[] =
    R"(The paged key/value cache: what a method keeps of every token, for all layers of a model.

A sequence is a number from new_sequence() or fork(). One step of one layer is append(), then attend(); all layers must
be brought to the same length before the next step. A page of 64 tokens is encoded once, when it is full.

Methods raise ValueError for what the caller got wrong, NotImplementedError for what no storage here serves, and
MemoryError where max_bytes or the machine is at its end. Threads may share a cache: their calls take turns.

On a GPU append() and attend() queue their work on a stream (attention() says which) and return, unless their tensors are
of other frameworks than PyTorch and CuPy; a call on another stream than the last waits for the last one's work. All
layers take the same tokens in the same steps. save(), load(), read(), fork(), truncate() and a cache that grows wait for
the device. What it cannot find out without waiting, check() tells.
)";

inline constexpr char kCacheInit[] = R"(An empty cache.

Args:
    method: "name[:key=value,...]", which also says what is stored.
    h_kv: KV heads.
    d: Channels of a key head, a multiple of 16 up to 256.
    d_v: Channels of a value head, the same; 0: as d.
    layers: Of the model.
    dtype: The 16-bit form: "float16" refuses values beyond 65504, "bfloat16" takes them.
    max_bytes: Limit of bytes().total that append() and fork() keep, on a GPU of reserved_bytes(); 0: none.
    device: "cpu", "cuda" or "cuda:1" and so on: where tensors must be, too.
    max_sequences: On a GPU: room to begin with, for so many sequences; 0: a few.
    max_tokens: And for so many tokens of each; 0: a few.
    max_step: And for steps of so many tokens of each, all of which have room in 16 bit from then on; 0: a few. A cache
        that must grow is copied, and needs the memory of both: read long prompts in steps.

Raises:
    ValueError: This build or machine has no such device.
    NotImplementedError: A GPU does not keep what `method` or `dtype` asks for: "bfloat16" among others.
)";

inline constexpr char kAppend[] = R"(Appends keys and values to one layer of the sequences, one after another.

They are read in place, whatever the strides before the last axis.

Args:
    seqs: [b] sequences.
    k: [b, s, h_kv, d].
    v: [b, s, h_kv, d_v].
    layer: The layer.
    stream: As in attention().

Raises:
    ValueError: NaN, Inf and values beyond the 16-bit form among others; on a GPU they give NaN, and check() raises.
        Where the message names a sequence, that one is as it was and those before it have grown.
)";

inline constexpr char kCheck[] = R"(Waits for the device, and says what append() could not.

Raises:
    ValueError: NaN, Inf or values beyond 65504 were appended since the last check; what reads their page is NaN.
)";

inline constexpr char kAttend[] = R"(Attention of rows that stand at the ends of the sequences.

Ends the step of the layer: 16-bit copies of pages that it alone needed are freed.

Args:
    seqs: [b] sequences.
    q: [b, s_q, h_q, d]; the last row stands at its sequence's last token.
    layer: The layer.
    method: None: the cache's own. Another may differ in what it promotes, not in what it needs stored.

Returns:
    As attention(), whose other arguments are these too.
)";

inline constexpr char kCacheSelect[] = R"(The selection that attend() would make, alone.

The arguments are those of attend().
)";

inline constexpr char kTruncate[] = R"(Shortens a sequence.

A cut into an encoded page is exact where its 16-bit form is stored, which holds for the last two full pages of a
sequence that has only grown.

Args:
    seq: The sequence.
    length: Tokens that stay.
    lossy: Rebuild the page that is cut from FP4 where that is all there is; not on a GPU.

Raises:
    NotImplementedError: The cut cannot be exact, and is not allowed to be lossy.
)";

inline constexpr char kSave[] = R"(Writes a sequence to a file.

An older file is replaced in one step; after an error it is untouched.

Args:
    seq: The sequence; all layers are of one length.
    path: The file.
    metadata: Up to 512 MiB of bytes of yours, kept with it.
)";

inline constexpr char kLoad[] = R"(Brings a saved sequence back, which goes on bit for bit as the saved one did.

Returns:
    (sequence, metadata).

Raises:
    FileNotFoundError: There is no such file.
    ValueError: The cache stores other things than the file's did, or the file is cut short or changed; the message says
        where. The cache is as it was.
)";

}  // namespace thriftattn::python::docs
