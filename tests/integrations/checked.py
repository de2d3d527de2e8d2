"""What `pronghorn check` finds, by name."""

import json

from pronghorn.cli.check import check

NAME = "model-00002-of-00002.safetensors"  # of the checkpoint `whole`


def found(folder, ecosystem="transformers", **options):
    return {finding.name: finding for finding in check(folder, ecosystem, **options)}


def states(findings):
    return {finding.state for finding in findings.values()}


def change_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))
