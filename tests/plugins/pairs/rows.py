"""Which methods go together: what is known of each pair, and the tests that show it; docs/pairs.md is made from it."""

from __future__ import annotations

from dataclasses import dataclass

WORKS, REFUSED, NEVER = "works", "refused", "never meet"
SERVING, MODELS, TRAINING, LOOPS = (
    f"tests/plugins/pairs/test_{name}.py" for name in ("serving", "models", "training", "loops")
)
LEROBOT = "tests/plugins/vlash/lerobot/test_pairs.py"
ELSEWHERE = "; a policy on a server may have an environment of its own (`pronghorn vlash serve`)"
NO_LEROBOT = f"LeRobot asks for older libraries, and importing the method says which it needs{ELSEWHERE}"
CALLABLE = "VLASH's control loop runs any callable beside the robot: chunks and commands are those of a direct call"


@dataclass(frozen=True)
class Row:
    """What happens where two methods meet.

    Attributes:
        methods: two names in the order of the alphabet, or one twice.
        where: the library, or the part of one.
        state: "works", "refused", or "never meet".
        says: what a user wants to know, in a sentence.
        tests: what shows it, as `file::function`; none where they never meet.
    """

    methods: tuple[str, str]
    where: str
    state: str
    says: str
    tests: tuple[str, ...] = ()


ROWS = [
    Row(("awq", "awq"), "transformers", REFUSED,
        "packed weights are not packed again, and a fused model is not fused again. A packed checkpoint that is loaded "
        "with other settings keeps its own, with a warning of transformers",
        (f"{MODELS}::test_packed_weights_are_not_packed_again",
         f"{MODELS}::test_a_packed_checkpoint_keeps_its_settings")),
    Row(("awq", "dcae"), "diffusers", WORKS,
        "the text encoder of a pipeline in 4 bits, as loaded or fused, beside an accelerated autoencoder: the same "
        "picture as with the rounded weights unpacked. A saved pipeline comes back to the bit",
        (f"{MODELS}::test_a_pipeline_with_a_packed_text_encoder",)),
    Row(("awq", "dcae"), "the autoencoder itself", REFUSED,
        "quantizations are diffusers' own there; AWQ is for the linears of language models",
        (f"{MODELS}::test_an_autoencoder_is_not_packed",)),
    Row(("awq", "duoattention"), "transformers", WORKS,
        "4-bit weights and a cache of two kinds of heads: fused first or last, with a growing or a static cache, the "
        "tokens are those of the unfused model",
        (f"{SERVING}::test_fused_linears_change_no_token",
         f"{SERVING}::test_graphs_of_a_fused_model_take_a_cache_of_ones_own")),
    Row(("awq", "duoattention"), "transformers, `reorder=True`", REFUSED,
        "rows of packed weights are not permuted; without `reorder` the result is the same",
        (f"{SERVING}::test_packed_heads_are_not_reordered",)),
    Row(("awq", "duoattention"), "vLLM", WORKS, "`--quantization pronghorn_awq` with a DuoAttention architecture gives "
        "the tokens of transformers", (f"{SERVING}::test_vllm_gives_the_tokens_of_transformers",)),
    Row(("awq", "torchsparse"), "torch", REFUSED,
        "AWQ packs the decoder blocks of language models; a network of sparse convolutions has none",
        (f"{MODELS}::test_sparse_networks_are_no_language_models",)),
    Row(("awq", "vcpo"), "TRL, LoRA on packed weights", WORKS,
        "with `prepare_lora`, exact and ghost norms: adapters learn what they learn on the unpacked weights, also from "
        "old rollouts (`lag`)",
        (f"{TRAINING}::test_adapters_learn_on_packed_weights", f"{TRAINING}::test_a_packed_policy_samples_with_lag")),
    Row(("awq", "vcpo"), "TRL, packed weights alone", REFUSED, "packed weights do not learn; an adapter is asked for",
        (f"{TRAINING}::test_packed_weights_do_not_learn",)),
    Row(("awq", "vcpo"), "TRL, whole weights for vLLM", REFUSED,
        "`use_vllm`, and an asynchronous sampler that takes whole weights: an adapter cannot be merged into packed "
        "ones. TRL gives a server with `--enable-lora` the adapter alone; that was not run here",
        (f"{TRAINING}::test_packed_weights_are_not_handed_to_vllm",)),
    Row(("awq", "vlash"), "a loop of your own", WORKS, CALLABLE,
        (f"{LOOPS}::test_a_policy_may_hold_another_method",)),
    Row(("awq", "vlash"), "LeRobot", REFUSED,
        f"{NO_LEROBOT}. Adapters on 4-bit weights are there by bitsandbytes (`lora_quantization`)",
        (f"{LEROBOT}::test_methods_of_newer_libraries_say_so",)),
    Row(("dcae", "dcae"), "diffusers", REFUSED, "an autoencoder that is fast already is not made so again",
        (f"{MODELS}::test_fast_forms_are_not_made_twice",)),
    Row(("dcae", "duoattention"), "diffusers", WORKS,
        "but gains nothing: a text encoder reads a short prompt once and has no cache, so the picture stays as it is",
        (f"{MODELS}::test_duoattention_leaves_a_text_encoder_as_it_is",)),
    Row(("dcae", "torchsparse"), "torch", REFUSED,
        "one is for autoencoders of images, the other for networks over occupied sites; each names what it takes",
        (f"{MODELS}::test_autoencoders_and_sparse_networks_are_told_apart",)),
    Row(("dcae", "vcpo"), "", NEVER, "VCPO trains models that write tokens, DC-AE's make images"),
    Row(("dcae", "vlash"), "a loop of your own", WORKS, f"{CALLABLE}; here one that sees latents",
        (f"{LOOPS}::test_a_policy_may_hold_another_method",)),
    Row(("duoattention", "duoattention"), "transformers", WORKS,
        "what was applied last makes its caches, older ones keep their pattern",
        (f"{MODELS}::test_a_second_pattern_leaves_the_first_as_it_was",)),
    Row(("duoattention", "duoattention"), "transformers, after `reorder=True`", REFUSED,
        "a pattern is for the order that the heads had",
        (f"{MODELS}::test_reordered_heads_take_no_other_pattern",)),
    Row(("duoattention", "torchsparse"), "torch", REFUSED, "streaming heads are for language models of transformers",
        (f"{MODELS}::test_sparse_networks_are_no_language_models",)),
    Row(("duoattention", "vcpo"), "TRL, its own sampling", WORKS,
        "but gains nothing: TRL samples without DuoAttention's cache, so a step is that of the model without it",
        (f"{TRAINING}::test_without_its_cache_duoattention_changes_no_step",)),
    Row(("duoattention", "vcpo"), "TRL, a `rollout_func` that samples with the cache", WORKS,
        "the sampler sees less than the learner, and VCPO's ratios are those of the two",
        (f"{TRAINING}::test_ratios_are_to_a_sampler_with_streaming_heads",)),
    Row(("duoattention", "vcpo"), "vLLM", WORKS,
        "a served DuoAttention model takes the trainer's new weights from files, and gives their tokens",
        (f"{SERVING}::test_vllm_takes_new_weights",)),
    Row(("duoattention", "vlash"), "a loop of your own", WORKS, CALLABLE,
        (f"{LOOPS}::test_a_policy_may_hold_another_method",)),
    Row(("duoattention", "vlash"), "LeRobot", REFUSED, NO_LEROBOT,
        (f"{LEROBOT}::test_methods_of_newer_libraries_say_so",)),
    Row(("torchsparse", "torchsparse"), "torch", REFUSED, "a fused network has nothing left to fuse",
        (f"{MODELS}::test_fast_forms_are_not_made_twice",)),
    Row(("torchsparse", "vcpo"), "without TRL, exact norms", WORKS,
        "a policy may hold sparse convolutions: the gradient is that of the same layer written densely",
        (f"{TRAINING}::test_a_policy_with_sparse_convolutions",)),
    Row(("torchsparse", "vcpo"), "without TRL, ghost norms", REFUSED,
        "a layer that learns and has no rule for its norm is named",
        (f"{TRAINING}::test_ghost_norms_name_a_sparse_convolution",)),
    Row(("torchsparse", "vlash"), "a loop of your own", WORKS, CALLABLE,
        (f"{LOOPS}::test_a_policy_may_hold_another_method",)),
    Row(("torchsparse", "vlash"), "LeRobot", WORKS,
        "sparse convolutions need torch alone, and run in LeRobot's environment",
        (f"{LEROBOT}::test_sparse_convolutions_run_here",)),
    Row(("vcpo", "vcpo"), "TRL", REFUSED, "a learning rate is scaled once: a second `VCPOCallback` is refused, and one "
        "on a `VCPOTrainer`", (f"{TRAINING}::test_a_rate_is_scaled_once",)),
    Row(("vcpo", "vlash"), "", NEVER,
        "VCPO needs the probability of what was sampled, and a chunk of actions comes with none"),
    Row(("vlash", "vlash"), "LeRobot", REFUSED, "`--policy.base=vlash` is answered with the policies that it can be",
        ("tests/plugins/vlash/lerobot/test_configuration.py::test_what_it_refuses",)),
]  # fmt: skip
