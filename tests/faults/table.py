"""The rows of the table of faults: what happens to users, the figure to reach, and what of it is not shown here.

A test that proves a row bears `@pytest.mark.fault(number)`; docs/reliability.md is written from this table and from
what such tests gave.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """A fault.

    Attributes:
        number: what tests call it by; what is no row of faults has a word.
        title: in a few words.
        fault: what goes wrong.
        figure: what is to hold all the same.
        missing: what of that no test of this repository shows, and why; empty where all of it is shown.
    """

    number: int | str
    title: str
    fault: str
    figure: str
    missing: str = ""


ROWS = (
    Row(
        1,
        "Broken checkpoint files",
        "A checkpoint is cut off, its tensors overlap, it is a web page or a pointer instead, or bits are flipped",
        "Every broken file is refused with its name within a second; of 2,000 random flips a loader, each is an error "
        "or is noticed by a checksum: no wrong number in silence",
        "files without a digest, which models that users save by `save_pretrained` have not until they are sealed: "
        "there only NaN, infinity and numbers out of range are found; a configuration so damaged that it no longer "
        "says that the model is quantized: transformers then asks us nothing, not even of a sealed folder, and only "
        "warns of the weights (flips that are warned only); `pronghorn check` finds it",
    ),
    Row(
        2,
        "Checkpoints that do not fit",
        "Names missing, too many or others; shape or dtype other than the configuration says; scales of zero, NaN or "
        "below zero; zero points beyond the codes; packed in another order",
        "An error that names tensor and layer; nothing is loaded in part without a word",
        "packed in another order: without a digest, codes that changed places are as good as the right ones",
    ),
    Row(
        3,
        "Hostile configurations",
        "Code to run, unknown names, a thousand million layers, deep nesting, senseless "
        "numbers, shards outside the folder",
        "An error; no code runs; less than 200 MB of memory",
        "a thousand million layers in the configuration of a model of transformers, which builds it before it asks us",
    ),
    Row(
        4,
        "Wrong tensors to a kernel",
        "A kernel is given the wrong device, dtype or layout",
        "An error that names the argument; strides that are allowed give the same bits as contiguous memory",
        "on some CPUs the references of three operations round otherwise unless MKL_CBWR=COMPATIBLE is set",
    ),
    Row(
        5,
        "Sizes at the edge",
        "Nothing, one, beside a tile's border, beyond 32-bit offsets, more blocks than a grid takes",
        "Equal to a float64 reference, or an error",
    ),
    Row(
        6,
        "Poisoned numbers",
        "NaN or infinity in weights, activations or calibration data; channels of zeros or of a constant; outliers "
        "10,000 times as large; overflow of float16; denormal numbers",
        "Weights: an error that names the tensor; calibration: one that names sample or layer; channels of zeros have "
        "finite scales; whatever is only rounded to nearest is listed",
        "AWQ lists no linear that is fed by denormal numbers alone, which has no influence and gets no scales",
    ),
    Row(
        7,
        "Bad calibration data",
        "Calibration data that are empty, too short, repeated or no text; the wrong tokenizer; a source that breaks in "
        "the middle",
        "An error before any work, or what was asked for",
    ),
    Row(
        8,
        "Killed or interrupted",
        "Long work is killed, interrupted, or loses power",
        "It goes on and ends with the same bits; at most one layer is lost; no half-written folder can be loaded",
    ),
    Row(
        9,
        "Resumed as another run",
        "A run is resumed with other weights, data, settings, code or library versions",
        "Refused, and what differs is named",
        "of VCPO other training data, and settings that are TRL's own, which TRL takes without a word; of trainings of "
        "DC-AE images or latents that changed and kept their names and sizes",
    ),
    Row(
        10,
        "No room on disk",
        "The disk is full, read-only or forbidden",
        "An OSError with the bytes needed and free, before the start where they are known; what was there stays; no "
        "temporary file is left",
    ),
    Row(
        11,
        "Out of memory",
        "Memory runs out during calibration",
        "Half the micro-batch up to three times, then an error that says what was needed and what to turn; memory is "
        "back where it was",
    ),
    Row(
        12,
        "Preemption",
        "vLLM takes a running request's blocks away",
        "64 requests give the tokens of a run without want, with 50 preemptions or more",
    ),
    Row(
        13,
        "Options of vLLM together",
        "vLLM's prefix cache, chunked prefill, compilation, asynchronous scheduling, speculation: on or off in pairs",
        "The same tokens, or a refusal at the start",
        "speculation other than by n-grams, so none with asynchronous scheduling, which vLLM refuses with them",
    ),
    Row(
        14,
        "Many requests at once",
        "Many requests at once, some aborted, some whose clients run out of time; several answers a prompt; prompts of "
        "no or too many tokens",
        "Each answer is that of its request alone; every block is given back",
        "LoRA beside none, which vLLM 0.32 gets wrong on a CPU by itself",
    ),
    Row(
        15,
        "A worker that dies",
        "A worker dies, or a layer raises after some steps",
        "Every request in flight gets an error within 10 seconds; the process ends; our words reach the caller",
        "our words at the client: vLLM tells it only that its engine had an issue, and they stand in the server's log",
    ),
    Row(
        16,
        "Running for long",
        "A server runs for long",
        "Memory grows by at most 1 MiB in 10,000 requests; descriptors and threads stay as many",
        "millions of requests; on a CPU vLLM itself grows with every new number of tokens (oneDNN's cache), which is "
        "limited to one entry here, and freed memory is given back before each sample",
    ),
    Row(
        17,
        "Broken plugins",
        "A plugin breaks: it does not import, raises, is slow, prints, registers twice, or has another's name",
        "All others and the library that loads them start as ever; one warning gives the reason, and so does "
        "`pronghorn info`",
    ),
    Row(
        18,
        "Missing or other libraries",
        "A library is not there, too old, too new, or imported in part",
        "Importing a method takes less than 0.2 seconds and no torch; using it says which version is needed and how to "
        "get it",
    ),
    Row(
        19,
        "Other versions of Pronghorn",
        "A checkpoint of an older or newer Pronghorn",
        "Older: the same bits for ever; newer: an error that says so",
    ),
    Row(
        20,
        "Compiled, copied, sharded",
        "torch.compile, export, copies, pickling to another process, shared memory, FSDP and DDP",
        "No graph breaks; at most one compilation more for a batch of any size; operations pass opcheck, and gradcheck "
        "where they train",
        "methods on a GPU; on a CPU each method's small example is what is tried, and DuoAttention's growing cache is "
        "not compiled; how often other sizes compile anew of other methods than AWQ, DC-AE and TorchSparse; FSDP of "
        "other methods than VCPO, DC-AE and TorchSparse",
    ),
    Row(
        21,
        "Computed twice",
        "The same is computed twice",
        "The same bits for the same seed; nothing that is not deterministic without a word",
        "methods on a GPU, save DC-AE's pipelines; AWQ and DuoAttention refuse VLLM_BATCH_INVARIANT",
    ),
    Row(
        22,
        "Threads",
        "Several models, configurations and streams at once; a fork; a switch of kernels in the middle",
        "The results of one after the other",
        "streams and a switch of kernels with any method; methods on a GPU",
    ),
    Row(
        23,
        "Tuning and compiling kernels",
        "Tuning and compilation of kernels: a stale or read-only cache, one configuration that does not compile, no "
        "compiler",
        "The next configuration with one warning; the reference only where that is allowed",
        "no kernel of ours tunes itself at run time; without a compiler there is Triton's own error",
    ),
    Row(
        24,
        "Another GPU, or none",
        "The GPU is too old or another vendor's, or there is none",
        "A table says what runs where; the reference runs; never an illegal instruction",
    ),
    Row(
        25,
        "Reinforcement learning",
        "Rewards that are NaN or all equal, empty completions, old rollouts, weights that were "
        "not handed over, a worker that starts again",
        "Losses stay finite; equal rewards teach nothing; age is counted and bounded; learner and sampler agree to "
        "1e-3; neutral settings are the stock trainer step by step",
        "1e-3 on a GPU, where vLLM's attention takes no float32: in float16 the bar is 1e-2",
    ),
    Row(
        26,
        "Robots",
        "Observations that are late, dropped, doubled, out of order or NaN; inference slower than a chunk; "
        "clocks that jump",
        "Never more than one control period without a command, unless a hold is declared; no command is NaN or out of "
        "range",
    ),
    Row(
        27,
        "Images and points",
        "Images and points: empty, of one pixel or voxel, huge, in odd colours, cut off; coordinates that are NaN, "
        "repeated or overflow",
        "An error, or equal to the reference",
    ),
    Row(
        28,
        "Generating images",
        "No guidance, one step, one pipeline again, one seed twice, a callback that raises or interrupts",
        "The pipeline can be used afterwards; the same seed gives the same bits; memory stays flat",
    ),
    Row(
        "gates",
        "Static gates",
        "Code of ours unpickles, evaluates text, trusts what it downloads, starts a shell or listens to everyone",
        "Nowhere, save in files that a test lists with the reason",
    ),
    Row(
        "dry run",
        "What a dry run says",
        "A long command takes other memory, disk or time than its `--dry-run` said",
        "Within 15 % of what then happens",
        "a time at the first try always: what else a machine does moves it, so there are three tries, of which one has "
        "to be within (on an H200 `awq eval` said 55 seconds at the first, of which it took 35); the time on a GPU "
        "whose host is shared: for work of many short kernels, as tokens one at a time, it moved by up to 40 % between "
        "runs of the same command",
    ),
)
