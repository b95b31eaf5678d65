"""Makes tests/tokenizers/: small vocabularies for the tokenizer tests. Run by hand: python tests/make_tokenizers.py

byte_level.json        a byte-level BPE of a few hundred merges that cross words, digits and punctuation, so that a
                       wrong cut before BPE changes the ids; shared by all byte-level families
sentencepiece.model    SentencePiece BPE as Llama's was trained: byte fallback, a space in front of each text
spaces.model           the same as Gemma's: no space in front, runs of spaces and newlines as user-defined pieces
How each family cuts and what it adds is in tests/tokenizer_families.py.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import tempfile
from pathlib import Path

HERE = Path(__file__).parent / "tokenizers"
WORDS = """
We'll see: they're sure I'd've said it's HERS, don't you think? WE'LL, THEY'RE, I'M. The user’s own ‘quotes’ it’s.
1 12 123 1234 12345 3.14159 1,000,000 0x1F 2024-01-31 10:20:30 x=1234; y2k 7up ½ ¼ ¾ x² m³ ٣٤٥ ५६७ Ⅻ ①②③ 一二三
naïve café Straße übergrößen Ångström e\u0301te\u0301 ñandú — “hello” … «oui» Ça, œuvre
Быстрая коричневая лиса прыгает. Ελληνικά γράμματα ΑΒΓ. שלום עולם. مرحبا بالعالم. हिन्दी में लिखना। ภาษาไทยไม่มีช่องว่าง
我想在apple工作1314151天。日本語のテキスト、カタカナ。한국어 문장입니다. 你好，世界！
👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪 ❤️ 🤗🤗
def f(x, *args, **kw):\n\treturn {k: v for k, v in kw.items() if v != None}  # ok

    if (a == b) && !c || d <= e: camelCase += HTTPServer;
---- ==== **** >>> <<< ... !!! ??? ``` /* */ // <!-- --> </s> <s> <unk> [INST] <|end|> <|im_start|> <0x41>\r\n\r\n
"""


def corpus() -> list[str]:
    """Some hundred paragraphs of English and code, and the same few lines of everything else again and again."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics)[:40])
    return [part for part in text.split("\n\n") if 20 < len(part) < 600] + WORDS.split("\n") * 12


def byte_level() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = list(alphabet), []
    # First with GPT-2's cut, then with none but the paragraphs': those merges go across all that a cut would part.
    for cut, size in ((True, 500), (False, 900)):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut)
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, show_progress=False, max_token_length=6
        )
        tokenizer.train_from_iterator(corpus(), trainer)
        merges += [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    merges = list(dict.fromkeys(merges))
    tokens = list(dict.fromkeys([*alphabet, *map("".join, merges)]))
    data = {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": [" ".join(merge) for merge in merges]}
    (HERE / "byte_level.json").write_text(json.dumps(data, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def sentencepiece(name: str, size: int, prefix: bool, user_defined: list[str], control: list[str]) -> None:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as schema

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "corpus.txt"
        text.write_text("\n".join(part.replace("\n", " ") for part in corpus()), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(Path(folder) / "m"),
            vocab_size=size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=prefix,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.99,
            user_defined_symbols=user_defined,
            control_symbols=control,
            num_threads=1,
            minloglevel=2,
        )
        proto = vars(schema)["ModelProto"]()
        proto.ParseFromString((Path(folder) / "m.model").read_bytes())
    proto.trainer_spec.ClearField("input")  # names of temporary files
    proto.trainer_spec.ClearField("model_prefix")
    (HERE / f"{name}.model").write_bytes(proto.SerializeToString(deterministic=True))


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    byte_level()
    sentencepiece("sentencepiece", 1000, True, [], [])
    runs = ["\n" * n for n in range(1, 6)] + ["▁" * n for n in range(2, 9)]
    sentencepiece("spaces", 1000, False, [*runs, "<h1>", "</h1>"], ["<start_of_turn>", "<end_of_turn>"])
