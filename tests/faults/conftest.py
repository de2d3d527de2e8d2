"""What is served, and answers that are known beforehand."""

import pytest
from tests.faults.serving import ANSWER, SIZES, TRIED, decided, in_process, random_prompts, save_models
from tests.models import tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Of the models that are served."""
    folder = tmp_path_factory.mktemp("served")
    save_models(tiny_model("llama", **SIZES), folder, group_size=32)
    return folder


@pytest.fixture(scope="session")
def alone(folder):
    """By method: prompts and what each is answered when nobody else asks."""
    made = {}

    def known(name):
        if name not in made:
            with in_process(folder, name) as llm:
                made[name] = decided(llm, random_prompts(28 * TRIED), ANSWER)[:28]
        return made[name]

    return known
