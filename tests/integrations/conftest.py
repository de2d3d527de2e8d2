"""A checkpoint that several rooms of `pronghorn check` look at."""

import pytest
from tests.integrations.checked import NAME
from tests.models import tiny_model


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A plain checkpoint of transformers, in two shards."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model("llama").save_pretrained(folder, max_shard_size="200KB")
    assert (folder / NAME).is_file()
    return folder
