"""DuoAttention's patterns and kept answers: tiny files of each, and how they are read."""

from tests.faults.loaders.table import loader


@loader("duoattention pattern", "full_attention_heads.tsv", "config.json")
class DuoPattern:
    @staticmethod
    def write(folder):
        from pronghorn.duoattention import DuoAttentionConfig

        DuoAttentionConfig(gates=[[0.25, 0.5], [0.75, 1.0]], sparsity=0.25, sink_size=4).save_pretrained(folder)

    @staticmethod
    def read(folder):
        from pronghorn.duoattention import DuoAttentionConfig

        return DuoAttentionConfig.from_pretrained(folder).to_dict()


@loader("duoattention answers", "answers.json")
class DuoAnswers:
    @staticmethod
    def write(folder):
        from pronghorn.duoattention.kept_answers import KeptAnswers

        kept = KeptAnswers(folder / "answers.json", {"model": "m", "limit": 3})
        for number in range(3):
            kept.keep(str(number), f"answer {number}")

    @staticmethod
    def read(folder):
        from pronghorn.duoattention.kept_answers import KeptAnswers

        kept = KeptAnswers(folder / "answers.json", {"model": "m", "limit": 3})
        return [kept.get(str(number)) for number in range(3)]
