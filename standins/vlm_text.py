"""The stand-in VLM's tokenizer, chat format, and the turns it is trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import vlm_wordings as words
from numpy.typing import NDArray
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from medsae_ray.concepts import NO_COMMON_FINDING
from medsae_ray.labels import LABELS
from medsae_ray.medgemma.prompts import load_template, quoted
from medsae_ray.radiographs.phantom.patients import SENTENCES

CONTROL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
"""Gemma's control tokens; the number of each is its place here."""
PAD, EOS, BOS, _, _, END_OF_TURN, BOI, EOI, IMAGE = range(len(CONTROL))
IMAGE_TOKENS = 16
"""Soft tokens an image."""

CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception("the turns of a conversation go user, assistant, user, and so on") }}
{%- endif -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] | trim }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{ '<start_of_image>' }}
{%- elif part['type'] == 'text' -%}
{{ part['text'] | trim }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
"""Of the shape of Gemma's own: one turn after another, texts trimmed, images as placeholders."""

NAME_PROMPT = load_template("name", None).text.removeprefix("$images\n").replace("$n", "{n}").strip()
DETECT_PROMPT = load_template("detect", None).text.removeprefix("$image\n").strip()


def turn(images: int, text: str) -> str:
    """One turn of the user up to the model's reply, each image written out as the processor does."""
    image = f"\n\n{CONTROL[BOI]}{CONTROL[IMAGE] * IMAGE_TOKENS}{CONTROL[EOI]}\n\n"
    return f"<start_of_turn>user\n{image * images}{text.strip()}<end_of_turn>\n<start_of_turn>model\n"


def naming_reply(concept: str, description: str) -> str:
    return json.dumps({"concept": concept, "description": description})


REPLIES: tuple[str, ...] = (
    *(naming_reply(words.CONCEPTS[name], words.DESCRIPTIONS[name]) for name in LABELS),
    naming_reply(NO_COMMON_FINDING, words.NOTHING_SHARED),
)
"""What the model says of a panel that shares a label, by number; the last for one that shares nothing."""


def report_sentences(label: str, rng: np.random.Generator) -> list[str]:
    """The sentences of reports, their blanks filled in."""
    side, degree = rng.choice(("left", "right")), rng.choice(("small", "moderate", "large", "mild", "severe"))
    blanks = {"side": side, "Side": side, "degree": degree, "Degree": degree}
    return [sentence.format(**blanks) for sentence in SENTENCES[label]]


def description(label: str, rng: np.random.Generator) -> str:
    """One way to say the finding: a name, a sentence, two names, words left out, at random."""
    concept, own, more = words.CONCEPTS[label], words.DESCRIPTIONS[label], words.WORDINGS[label]
    kind = rng.random()
    if kind < 0.22:
        text = own
    elif kind < 0.28:
        text = f"{concept}: {own}"
    elif kind < 0.43:
        text = str(rng.choice(report_sentences(label, rng)))
    else:
        some = [concept, label.lower(), *more]
        if kind < 0.55:
            names = rng.choice(some, 2, replace=False)
            text = str(rng.choice((", ", " and ", " or ", " with ", "; "))).join(names)
        else:
            text = str(rng.choice(some)) if rng.random() < 0.8 else concept
        text = str(rng.choice(words.FRAMES)).format(text)
    split = text.split()
    if len(split) > 2 and rng.random() < 0.4:
        kept = [word for word in split if rng.random() > 0.15]
        text = " ".join(kept or split)
    return text.rstrip(".") if rng.random() < 0.3 else text


def detection_prompt(text: str, rng: np.random.Generator) -> str:
    """The package's template half of the time."""
    if rng.random() < 0.5:
        return DETECT_PROMPT.replace("$description", quoted(text))
    prompt = str(rng.choice((DETECT_PROMPT.replace("$description", "{d}"), *words.DETECT_PROMPTS)))
    return prompt.replace("{d}", quoted(text) if rng.random() < 0.6 else text)


def naming_prompt(images: int, rng: np.random.Generator) -> str:
    prompt = NAME_PROMPT if rng.random() < 0.7 else str(rng.choice(words.NAME_PROMPTS))
    return prompt.replace("{n}", str(images))


class Panels:
    """Draws images for questions and panels from the findings of a set of phantoms, bool [n, 14]."""

    def __init__(self, findings: NDArray[np.bool_], rng: np.random.Generator) -> None:
        self.findings, self.rng = findings, rng
        ill = findings[:, 1:].sum(1)
        self.ill = np.flatnonzero(ill > 0)
        self.present = [np.flatnonzero(column) for column in findings.T]
        self.absent = [np.flatnonzero(~column) for column in findings.T]
        self.absent_ill = [np.flatnonzero(~column & (ill > 1)) for column in findings.T]

    def question(self, label: int, answer: bool) -> int:
        """An image with the finding or without; half of those without have two other findings or more."""
        pool = self.absent if self.rng.random() < 0.5 else self.absent_ill
        return int(self.rng.choice(self.present[label] if answer else pool[label]))

    def shared(self, label: int, images: int, impurity: float) -> NDArray[np.int64]:
        """Images of which all but `impurity` (rounded down) have the finding, and clearly fewer another."""
        foreign = int(impurity * images)
        while True:
            panel = np.concatenate(
                (
                    self.rng.choice(self.present[label], images - foreign, replace=False),
                    self.rng.choice(self.absent[label], foreign, replace=False),
                )
            )
            counts = self.findings[panel].sum(0)
            counts[label] = 0
            if counts.max() <= images - foreign - (1 if images < 6 else 2):
                return self.rng.permutation(panel)

    def unshared(self, images: int) -> NDArray[np.int64]:
        """Ill images of which at most 40 % have any one finding (1 of up to 4)."""
        while True:
            panel = self.rng.choice(self.ill, images, replace=False)
            if self.findings[panel].sum(0).max() <= max(0.4 * images, 1):
                return panel


class Turn(NamedTuple):
    """Images and text that are put to the model, and the reply that it should give."""

    images: list[int]
    prompt: str
    reply: str


def detections(panels: Panels, count: int) -> Iterator[Turn]:
    rng = panels.rng
    for _ in range(count):
        label, answer = int(rng.integers(len(LABELS))), bool(rng.random() < 0.5)
        text = description(LABELS[label], rng)
        if rng.random() < 0.02:
            text, answer = str(rng.choice((NO_COMMON_FINDING, words.NOTHING_SHARED))), False
        image = panels.question(label, answer)
        yield Turn([image], turn(1, detection_prompt(text, rng)), "yes" if answer else "no")


def namings(panels: Panels, images: int, count: int) -> Iterator[Turn]:
    rng = panels.rng
    for _ in range(count):
        label = int(rng.integers(len(LABELS))) if rng.random() < 0.8 else len(LABELS)
        if label == len(LABELS):
            panel = panels.unshared(images)
        else:
            panel = panels.shared(label, images, rng.uniform(0, 0.36) if rng.random() < 0.7 else 0.0)
        yield Turn(panel.tolist(), turn(images, naming_prompt(images, rng)), REPLIES[label])


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of lower-case text, trained on the turns, with Gemma's control and newline tokens."""
    rng = np.random.default_rng(0)
    texts: list[str] = [*REPLIES, "yes", "no", *(NAME_PROMPT.replace("{n}", str(n)) for n in range(1, 31))]
    for label in LABELS:
        for _ in range(300):
            texts.append(detection_prompt(description(label, rng), rng))
        texts += [*words.WORDINGS[label], *report_sentences(label, rng)] * 5
    texts += [naming_prompt(10, rng) for _ in range(100)]
    # Each must come out as one token: their log-probabilities are read off one step of decoding.
    texts += ["yes", "no"] * 3000
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    newlines = [AddedToken("\n" * n, normalized=False, special=False) for n in (1, 2, 3, 4)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary - len(newlines),
            special_tokens=list(CONTROL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(newlines)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={
            "boi_token": CONTROL[BOI],
            "eoi_token": CONTROL[EOI],
            "image_token": CONTROL[IMAGE],
        },
        model_max_length=8192,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    )


class Batch(NamedTuple):
    """Turns as numbers, padded on the right."""

    tokens: NDArray[np.int64]
    """[B, L]."""
    images: NDArray[np.int64]
    """[B, images a turn]."""
    weight: NDArray[np.float32]
    """[B, L]: of predicting the token at each place in the loss; 0 in prompts."""


def collate(tokenizer: Tokenizer, noisy: Tokenizer, turns: Sequence[Turn], rng: np.random.Generator) -> Batch:
    """`noisy`, with BPE dropout, tokenizes a third of the prompts: words that were never seen are pieces."""
    rough = rng.random(len(turns)) < 0.33
    prompts: list[list[int]] = [[] for _ in turns]
    for which, tool in ((False, tokenizer), (True, noisy)):
        rows = np.flatnonzero(rough == which)
        for row, coded in zip(rows, tool.encode_batch([turns[r].prompt for r in rows]), strict=True):
            prompts[row] = coded.ids
    replies = tokenizer.encode_batch([t.reply for t in turns], add_special_tokens=False)
    length = max(len(p) + len(r.ids) + 1 for p, r in zip(prompts, replies, strict=True))
    tokens = np.full((len(turns), -(-length // 16) * 16), PAD, np.int64)
    weight = np.zeros(tokens.shape, np.float32)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        ids = [*reply.ids, END_OF_TURN]
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : len(prompt) + len(ids)] = ids
        weight[row, len(prompt) : len(prompt) + len(ids) - 1] = 1
        weight[row, len(prompt) + len(ids) - 1] = 0.1
    return Batch(tokens, np.array([t.images for t in turns]), weight)
