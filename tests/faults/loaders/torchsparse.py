"""TorchSparse++'s plans: tiny files of each, and how they are read."""

from tests.faults.loaders.table import loader


@loader("torchsparse plans", "plans.json")
class TorchsparsePlans:
    @staticmethod
    def write(folder):
        from pronghorn.torchsparse import ConvConfig
        from pronghorn.torchsparse.tuner import _save

        _save(folder / "plans.json", "cpu, float32", {"stride=1x1x1": ConvConfig(ifsort=True, split_mask_num=2)})

    @staticmethod
    def read(folder):
        from pronghorn.torchsparse.tuner import _config, _load

        path = folder / "plans.json"
        plans = _load(path)
        return {where: {group: _config(plan, path, where) for group, plan in groups.items()}
                for where, groups in plans.items()}  # fmt: skip
