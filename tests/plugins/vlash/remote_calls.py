"""What a robot asks a policy server in tests, and messages that no client of ours would send."""

import json

import grpc
import pytest
import torch
from safetensors.torch import save

from pronghorn.vlash.chunks import ChunkRequest, Observation
from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.remote import Description
from pronghorn.vlash.remote.container import VERSION

SETTINGS = VLASHSettings(chunk_size=6, n_action_steps=4, inference_overlap_steps=2, fps=50)
DESCRIPTION = Description("ramp", SETTINGS, state_dim=2, action_dim=2, inputs=("camera",))
IMAGE = (torch.arange(8 * 10 * 3) % 251).to(torch.uint8).view(8, 10, 3)


def ramp(request):
    """Goes on by 1 a step from the state, shifted by what the camera sees, and by the delay."""
    shift = request.observation.content["camera"].float().mean() + 1000 * request.delay
    return request.state[..., None, :] + torch.arange(6.0)[:, None] + shift


def request_of(state=(1.0, 2.0), delay=3, **content):
    state = torch.tensor(state)
    leftover = torch.arange(10.0).view(5, 2).expand(*state.shape[:-1], 5, 2)
    return ChunkRequest(Observation({"camera": IMAGE, "task": "go", **content}, state - 1), state, delay, leftover)


def raw(server, data, method="Chunk", token=None):
    """Bytes as they are; the error's code and text."""
    metadata = [("authorization", token)] if token is not None else []
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/pronghorn.vlash.PolicyServer/{method}")(data, timeout=5, metadata=metadata)
    return caught.value.code().name, caught.value.details()


def message(header=None, metadata=None, **tensors):
    """A request with something changed."""
    fields = {"version": VERSION, "kind": "request", "delay": 0, "text": {}, "jpeg": {}}
    fields |= header or {}
    fields = {name: value for name, value in fields.items() if value is not None}
    given = {"state": torch.zeros(2), "measured": torch.zeros(2), "seen:camera": IMAGE} | tensors
    return save(
        {name: value for name, value in given.items() if value is not None}, metadata or {"vlash": json.dumps(fields)}
    )
