"""New weights for a model that vLLM serves: its probabilities are then those of the new weights, the head's too."""

import gc

import pytest
import torch
from safetensors.torch import save_file
from tests.plugins.vcpo.addition import EOS, llama

PROMPT = [1, 10, 2, 11]


def log_probs(model, tokens):
    with torch.no_grad():
        found = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    return found.gather(-1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_server_takes_them(tied, tmp_path):
    from vllm import LLM, SamplingParams

    sizes = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 64, "tie_word_embeddings": tied}
    llama(**sizes).save_pretrained(tmp_path / "start")
    gc.collect()  # an engine of another test that is freed later would end what both share
    engine = LLM(str(tmp_path / "start"), dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
                 max_model_len=64, worker_extension_cls="pronghorn.vllm.weight_files.WeightFiles")  # fmt: skip
    sampling = SamplingParams(max_tokens=8, logprobs=0, seed=0, detokenize=False, stop_token_ids=[EOS])

    def gap(model):
        output = engine.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)[0].outputs[0]
        theirs = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
        return float((torch.tensor(theirs) - log_probs(model, list(output.token_ids))).abs().max())

    assert gap(llama(**sizes)) < 1e-4
    for seed in (1, 2):
        new = llama(seed, **sizes)
        folder = tmp_path / str(seed)
        folder.mkdir()
        save_file(
            {name: weight.detach().clone() for name, weight in new.named_parameters()}, folder / "new.safetensors"
        )
        engine.collective_rpc("load_weight_files", args=(str(folder),))
        engine.reset_prefix_cache()
        assert gap(new) < 1e-4
        assert gap(llama(**sizes)) > 1e-2
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        engine.collective_rpc("load_weight_files", args=(str(tmp_path / "nowhere"),))
    assert gap(new) < 1e-4
