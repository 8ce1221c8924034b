"""Files to tokens: what a corpus holds, and what its tokens stand for."""

import base64
import importlib.util
import socket
import sys
from pathlib import Path

import data
import numpy as np
import pytest
from inputs import InputError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = "To be, or not to be, that is the question: é 12345\n" * 40


def ranks(tokens, first):
    """Lines of a file of ranks."""
    lines = (
        base64.b64encode(token) + b" %d\n" % rank
        for rank, token in enumerate(tokens, first)
    )
    return b"".join(lines)


BYTES = ranks([bytes([byte]) for byte in range(256)], first=0)


@pytest.fixture(autouse=True)
def nothing_is_downloaded(monkeypatch):
    def refuse(*_):
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def write_ranks(path, *merges):
    """All single bytes, by value, and then the merges."""
    path.write_bytes(BYTES + ranks(merges, first=256))
    return path


def write_json(path):
    """Byte pairs of the text, over all bytes; 0 marks the start of a short input."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = Tokenizer(models.BPE())
    found.pre_tokenizer, found.decoder = words, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=words.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator([TEXT], trainer)
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    found.save(str(path))
    return path


@pytest.fixture(params=["json", "tiktoken"])
def vocabulary(tmp_path, request):
    """A file of either kind, and its number of ids."""
    if request.param == "tiktoken":
        return write_ranks(tmp_path / "few.tiktoken", b" be", b"to", b" to"), 259
    path = write_json(tmp_path / "tokenizer.json")
    return path, Tokenizer.from_file(str(path)).get_vocab_size()


def test_text_is_bytes_by_default(text):
    corpus = data.load(text, context=16)
    assert bytes([*corpus.train, *corpus.held_out]).decode() == TEXT
    assert len(corpus.train) == len(TEXT.encode()) * 9 // 10
    assert (corpus.vocabulary, corpus.unit, corpus.bytes_per_token) == (256, "byte", 1)
    assert corpus.decode(corpus.held_out.tolist()) == TEXT[-len(corpus.held_out) + 4 :]


def test_a_vocabulary_on_disk_makes_tokens_and_text_again(text, vocabulary):
    path, size = vocabulary
    corpus, as_bytes = data.load(text, 16, path), data.load(text, 16)
    assert (corpus.vocabulary, corpus.unit) == (size, "token")
    for tokens, content in (
        (corpus.train, as_bytes.train),
        (corpus.held_out, as_bytes.held_out),
    ):
        assert tokens.dtype == np.int32
        assert 0 < tokens.min() < tokens.max() < size
        assert corpus.decode(tokens.tolist()) == bytes(content).decode()
        assert len(tokens) < 0.95 * len(content)
    ratio = len(as_bytes.held_out) / len(corpus.held_out)
    assert corpus.bytes_per_token == ratio


def test_ranks_join_bytes_within_words_alone(tmp_path):
    path = write_ranks(tmp_path / "few.tiktoken", b"th", b"the", b"34", b"n t")
    tokenizer = data.load_tokenizer(path)
    # By hand: "the" | " th" "é" of two bytes.
    assert tokenizer.encode("the thé") == [257, 32, 256, 195, 169]
    assert tokenizer.encode("n t") == [110, 32, 116]
    # Digits are taken by three: 123 | 45.
    assert tokenizer.encode("12345") == [49, 50, 51, 52, 53]
    assert tokenizer.encode("345") == [258, 53]


def test_a_vocabulary_that_has_changed_is_read_again(tmp_path, monkeypatch):
    copies = tmp_path / "copies"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(copies))
    path = write_ranks(tmp_path / "few.tiktoken", b"th")
    assert data.load_tokenizer(path).encode("be") == [98, 101]
    write_ranks(path, b"be")
    assert data.load_tokenizer(path).encode("be") == [256]
    assert not copies.exists()


def test_a_vocabulary_made_for_short_inputs_takes_long_ones(tmp_path):
    path = write_json(tmp_path / "tokenizer.json")
    found = Tokenizer.from_file(str(path))
    found.enable_truncation(8)
    found.enable_padding(length=8)
    found.save(str(path))
    tokenizer = data.load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert len(tokenizer.encode("to")) < 8


def test_ids_that_only_the_model_knows_are_no_text(text, vocabulary):
    path, size = vocabulary
    ids = data.load_tokenizer(path).encode("to be")
    assert data.load(text, 16, path).decode([size, *ids, 50_303]) == "to be"
    assert data.load(text, 16).decode([256, *b"to be", 50_303]) == "to be"


def test_texts_are_made_tokens_one_by_one(tmp_path, monkeypatch):
    folder, given = tmp_path / "texts", []

    def encode(text):
        given.append(text)
        return list(text.encode())

    folder.mkdir()
    for name in "abcd":
        (folder / name).write_text(name * 100)
    tokenizer = data.Tokenizer(encode, lambda ids: bytes(ids).decode(), 256)
    monkeypatch.setattr(data, "load_tokenizer", lambda path: tokenizer)
    corpus = data.load(folder, 16, folder / "tokenizer.json")
    as_bytes = data.load(folder, 16)
    np.testing.assert_array_equal(corpus.train, as_bytes.train)
    np.testing.assert_array_equal(corpus.held_out, as_bytes.held_out)
    assert all(len(set(text.strip())) <= 1 for text in given)


def test_a_folder_is_all_its_text_and_nothing_else(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("é" * 300, encoding="utf-8")
    (tmp_path / "two.md").write_text("b" * 500)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0" * 100)
    (tmp_path / "latin.txt").write_bytes(b"\xe9" * 100)
    (tmp_path / ".hidden").write_text("secret" * 100)
    corpus = data.load(tmp_path, context=16)
    everything = bytes(np.concatenate([corpus.train, corpus.held_out])).decode()
    assert sorted(everything.split("\n")) == ["b" * 500, "é" * 300]


def test_a_folder_is_cut_at_the_same_place_with_a_vocabulary(tmp_path, vocabulary):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.txt").write_text(f"{i} to be\n" * 20 * (1 + i))
    corpus, as_bytes = data.load(folder, 16, vocabulary[0]), data.load(folder, 16)
    length = len(as_bytes.train) + len(as_bytes.held_out)
    assert len(as_bytes.train) == length * 9 // 10
    for part in ("train", "held_out"):
        tokens, content = getattr(corpus, part), getattr(as_bytes, part)
        assert corpus.decode(tokens.tolist()) == bytes(content).decode()


def test_a_letter_that_is_cut_in_two_is_left_out(tmp_path, vocabulary):
    path = tmp_path / "letters.txt"
    path.write_text("é" * 105, encoding="utf-8")
    corpus, as_bytes = data.load(path, 4, vocabulary[0]), data.load(path, 4)
    assert [len(as_bytes.train), len(as_bytes.held_out)] == [189, 21]
    assert corpus.decode(corpus.train.tolist()) == "é" * 94
    assert corpus.decode(corpus.held_out.tolist()) == "é" * 10
    half = "\N{REPLACEMENT CHARACTER}"
    assert as_bytes.decode(as_bytes.held_out.tolist()) == half + "é" * 10


def test_the_default_is_python_s_library_without_its_tests(tmp_path, monkeypatch):
    for name in ("a.py", "b/c.py", "test/d.py", "site-packages/e.py", "f.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name[0] * 100)
    paths = {"stdlib": str(tmp_path)}
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: paths)
    corpus = data.load(None, context=16)
    everything = bytes(np.concatenate([corpus.train, corpus.held_out]))
    assert set(everything.decode()) == {"a", "b", "\n"}
    assert corpus.name == "Python's standard library"


def test_ids_on_disk_are_split_and_shown_as_numbers(tmp_path):
    np.arange(5000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    corpus = data.load(tmp_path / "tokens.bin", context=16)
    assert corpus.vocabulary == 5000
    assert corpus.bytes_per_token is None
    assert corpus.decode([7, 4999]) == "7 4999 "
    assert corpus.held_out.tolist() == list(range(4500, 5000))


def test_beside_train_bin_val_bin_is_held_out(tmp_path):
    np.zeros(100, np.uint16).tofile(tmp_path / "train.bin")
    np.full(50, 9, np.uint16).tofile(tmp_path / "val.bin")
    corpus = data.load(tmp_path / "train.bin", context=16)
    assert (len(corpus.train), corpus.held_out.tolist()) == (100, [9] * 50)
    assert corpus.vocabulary == 10


def test_ids_on_disk_are_text_where_their_vocabulary_is_given(tmp_path, vocabulary):
    path, size = vocabulary
    # The vocabulary has more ids than the text.
    ids = np.array(data.load_tokenizer(path).encode(TEXT[:10] * 90), np.uint16)
    assert ids.max() < size - 1
    ids.tofile(tmp_path / "tokens.bin")
    corpus = data.load(tmp_path / "tokens.bin", 16, path)
    assert corpus.vocabulary == size
    assert corpus.decode(ids.tolist()) == TEXT[:10] * 90
    held_out = corpus.decode(corpus.held_out.tolist()).encode()
    assert corpus.bytes_per_token == len(held_out) / len(corpus.held_out)
    assert corpus.bytes_per_token > 1.05
    np.full(100, size, np.uint16).tofile(tmp_path / "other.bin")
    with pytest.raises(InputError, match=f"^--tokenizer: .* has ids up to {size}, .*$"):
        data.load(tmp_path / "other.bin", 16, path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "no such file: .*; check the path"),
        ("folder.json", "folder", "no such file: .*; check the path"),
        ("words.txt", b"a b", "cannot read .*; give a tokenizer.json or a .*"),
        ("empty.json", b"", ".* is not a tokenizers file: .+"),
        ("other.json", b'{"model": 3}', ".* is not a tokenizers file: .+"),
        ("binary.json", b"\xff\0", ".* is not a tokenizers file: .+"),
        ("empty.tiktoken", b"", ".* is not a tiktoken file: .+"),
        (
            "few.tiktoken",
            b"QQ== 0\n",
            ".* is not a tiktoken file: not every byte has .*",
        ),
        (
            "twice.tiktoken",
            BYTES + b"dGg= 9\n",
            ".* is not a tiktoken file: two .* rank",
        ),
        ("words.tiktoken", b"to be or\nnot", ".* is not a tiktoken file: a line is .*"),
        ("binary.tiktoken", b"\xff\0", ".* is not a tiktoken file: .+"),
    ],
)
def test_a_vocabulary_that_cannot_be_read_is_one_line(
    tmp_path, text, name, content, message
):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        data.load(text, 16, path)
    (line,) = str(caught.value).splitlines()
    assert str(path) in line
    assert caught.match(f"^--tokenizer: {message}$")


def test_only_who_asks_for_a_vocabulary_needs_its_package(
    text, vocabulary, monkeypatch
):
    path, _ = vocabulary
    package = {".json": "tokenizers", ".tiktoken": "tiktoken"}[path.suffix]
    monkeypatch.setitem(sys.modules, package, None)  # As if it were not installed.
    spec = importlib.util.spec_from_file_location("fresh", Path(data.__file__))
    assert spec is not None
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh", fresh)
    spec.loader.exec_module(fresh)
    assert fresh.load(text, 16).vocabulary == 256
    with pytest.raises(InputError, match=f"^--tokenizer: .* {package}; pip install"):
        fresh.load(text, 16, path)


def test_text_too_short_for_a_window_is_counted_in_tokens(tmp_path, vocabulary):
    path = tmp_path / "short.txt"
    path.write_text(" to be" * 20)  # 12 bytes are held out: at most 5 tokens.
    with pytest.raises(InputError, match=r"has [345] tokens and a window takes 10;"):
        data.load(path, 9, vocabulary[0])


def test_held_out_text_is_never_trained_on(tmp_path):
    np.arange(5000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    corpus = data.load(tmp_path / "tokens.bin", context=16)
    train = data.Windows(corpus.train, 16, 4, seed=0)
    seen = {int(token) for step in range(200) for token in train(step).flat}
    assert len(seen) > 4400
    assert seen.isdisjoint(corpus.held_out.tolist())


def test_every_token_is_predicted_once_per_epoch():
    batches = data.Windows(np.arange(161, dtype=np.uint16), 16, 5, seed=0)
    epochs = [np.concatenate([batches(2 * i), batches(2 * i + 1)]) for i in range(2)]
    for epoch in epochs:
        assert epoch.dtype == np.int32
        assert sorted(epoch[:, 1:].flat) == list(range(1, 161))
        np.testing.assert_array_equal(np.diff(epoch), 1)
    assert not np.array_equal(*epochs)


def test_batches_depend_on_the_step_alone():
    stream = np.arange(2000)
    one, other = (data.Windows(stream, 16, 4, seed=3) for _ in range(2))
    expected = [one(step) for step in range(50)]
    for step in (49, 7, 30):  # A resumed run asks for any step first.
        np.testing.assert_array_equal(other(step), expected[step])
    assert not np.array_equal(data.Windows(stream, 16, 4, seed=4)(0), expected[0])


# --- what is not text, or not ids ---------------------------------------------------


def test_a_folder_says_what_it_left_out(tmp_path):
    (tmp_path / "good.txt").write_text("good " * 100)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 100)
    (tmp_path / "packed.gz").write_bytes(b"\x1f\x8b\x08" + b"x" * 100)
    (tmp_path / "more.zip").write_bytes(b"PK\x03\x04" + b"x" * 100)
    (tmp_path / "table.npy").write_bytes(b"ab\0" * 100)
    (tmp_path / "empty").write_bytes(b"")
    said = sorted(data.load(tmp_path, 16).left_out)
    assert len(said) == 4
    text = "\n".join(said).replace(f"{tmp_path}/", "")
    assert "left out latin.txt: it is not UTF-8: byte 0xe9 at offset 3" in text
    assert "left out table.npy: it has a NUL byte at offset 2" in text
    assert "left out empty: it is empty" in text
    assert " and 1 more: it is compressed" in text
    (tmp_path / "latin.txt").rename(tmp_path / ".hidden")
    assert len(data.load(tmp_path, 16).left_out) == 3
    assert data.load(tmp_path / "good.txt", 16).left_out == ()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"good" * 50 + b"\xff" + b"good" * 50, "not UTF-8: byte 0xff at offset 200"),
        (b"good" * 50 + b"\0" + b"good" * 50, "has a NUL byte at offset 200"),
        (b"BZh9" + b"x" * 300, "is compressed"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 300, "is compressed"),
        (b"", "is empty"),
    ],
)
def test_a_file_that_is_no_text_is_refused_with_the_place(tmp_path, content, why):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        data.load(path, 16)
    (line,) = str(error.value).splitlines()
    assert line == f"--data: {path}: it {'is ' * (why[:3] == 'not')}{why}; {UTF_8}"


UTF_8 = "give a text file in UTF-8"
IDS = np.random.default_rng(0).integers(0, 50_000, 9000)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "uint64", "int64"])
def test_ids_of_every_width_are_read_and_said(tmp_path, dtype):
    IDS.astype(dtype).tofile(tmp_path / "tokens.bin")
    corpus = data.load(tmp_path / "tokens.bin", 16)
    np.testing.assert_array_equal([*corpus.train, *corpus.held_out], IDS)
    assert corpus.vocabulary == IDS.max() + 1
    read = dtype.replace("int", "uint").replace("uuint", "uint")
    said = () if read == "uint16" else (f"{tmp_path}/tokens.bin: {read} ids",)
    assert corpus.left_out == said


def llm_c(path, ids, magic, version, dtype):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())


@pytest.mark.parametrize(
    ("magic", "version", "dtype"),
    [(20240520, 1, "uint16"), (20240801, 7, "uint32")],
)
def test_the_header_of_llm_c_is_no_token(tmp_path, magic, version, dtype):
    path = tmp_path / "tokens.bin"
    llm_c(path, IDS, magic, version, dtype)
    corpus = data.load(path, 16)
    np.testing.assert_array_equal([*corpus.train, *corpus.held_out], IDS)
    assert corpus.left_out == (f"{path}: {dtype} ids behind a header of llm.c",)
    with path.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(InputError, match="5000 bytes, but its header says 9000 tokens"):
        data.load(path, 16)


@pytest.mark.parametrize("where", [0, 777, 8999])
def test_one_id_far_above_all_others_is_refused(tmp_path, monkeypatch, where):
    monkeypatch.setattr(data, "_PART", 1000)
    path, ids = tmp_path / "tokens.bin", (np.arange(9000) % 300).astype(np.uint16)
    ids.tofile(path)
    assert data.load(path, 16).vocabulary == 300
    ids[where] = 65535
    ids.tofile(path)
    with pytest.raises(InputError) as error:
        data.load(path, 16)
    part = where if where < 8100 else where - 8100  # The last tenth is held out.
    assert f"has id 65535 at token {part}, far above nearly all" in str(error.value)
    assert "end at 299; mend the file, or give the --tokenizer" in str(error.value)


def test_ids_that_no_vocabulary_has_are_refused(tmp_path):
    ids = IDS.astype(np.uint32)
    ids[5000] = 2**31
    ids.tofile(tmp_path / "tokens.bin")
    with pytest.raises(InputError, match="has a token id of 2147483648, which no"):
        data.load(tmp_path / "tokens.bin", 16)


def test_ids_of_a_sparse_text_are_taken(tmp_path):
    """A small text in a large vocabulary: its rare words have high ids."""
    ids = np.minimum(np.random.default_rng(0).zipf(1.3, 20_000), 50_256)
    ids.astype(np.uint16).tofile(tmp_path / "tokens.bin")
    assert data.load(tmp_path / "tokens.bin", 16).vocabulary == 50_257


def test_every_token_has_an_origin(tmp_path, vocabulary):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text(name * 100)
    for given, unit in ((None, "byte"), (vocabulary[0], "token")):
        corpus = data.load(folder, 16, given)
        for position in range(len(corpus.train)):
            path, offset = corpus.origin(position).rsplit(f", {unit} ", 1)
            if unit == "byte":
                text = Path(path).read_bytes() + b"\n"
                assert text[int(offset)] == corpus.train[position]
            letter = corpus.decode([int(corpus.train[position])])
            assert letter.strip() == "" or Path(path).name in letter


def test_the_windows_of_a_batch_are_where_their_starts_say():
    stream = np.arange(2000)
    batches = data.Windows(stream, 16, 4, seed=3)
    for index in range(50):
        np.testing.assert_array_equal(batches(index)[:, 0], batches.starts(index))
