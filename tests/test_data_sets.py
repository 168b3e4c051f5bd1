"""The emoji and stamp sets, built from tiny folders made here; the real ones are looked at where they are installed."""

import io
import json
from types import SimpleNamespace

import pytest
import torch

from mmfast.data.emoji import ARTISTS, emoji_names, load_emoji, noto_glyphs
from mmfast.data.install import MARKER, cache_dir, installed
from mmfast.data.splits import groups, split_by_group
from mmfast.data.stamps import load_stamps, perceptual_hash, read_captions

pillow = pytest.importorskip("PIL.Image")
pytest.importorskip("resvg_py")


def picture(colour, size=(32, 32), kind="PNG"):
    buffer = io.BytesIO()
    pillow.new("RGB", size, colour).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def svg(colour):
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><rect width="9" height="9" fill="{colour}"/></svg>'
    )


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def mark(folder):
    write(folder / MARKER, json.dumps({"package": "p", "archive": "a", "files": 1, "sha256": "0"}))


# Code points, group, name in OpenMoji's table. The last ones must not become concepts.
TABLE = [
    ("1F600", "smileys-emotion", "grinning face"),
    ("1F436", "animals-nature", "dog face"),
    ("1F468", "people-body", "man"),
    ("1F468-200D-2695-FE0F", "people-body", "man health worker"),
    ("1F1F3-1F1F4", "flags", "flag: Norway"),
    ("1F1E7-1F1FB", "flags", "flag: Bouvet Island"),
    ("1F1F3-1F1FF", "flags", "New Zealand"),
    ("1F468-1F3FB", "people-body", "man: light skin tone"),
    ("1F98A", "animals-nature", "fox, which Twemoji lacks"),
    ("E000", "extras-openmoji", "an extra, which only OpenMoji has"),
]


@pytest.fixture
def emoji_cache(tmp_path, monkeypatch):
    root = tmp_path / "emoji"
    noto = {}
    for n, (code, _, name) in enumerate(TABLE):
        seq = tuple(int(c, 16) for c in code.split("-") if c != "FE0F")
        colour = (20 * n, 10, 10)
        write(root / f"openmoji/color/svg/{code}.svg", svg(f"rgb({20 * n},10,20)"))
        if code == "E000":
            continue
        # Both flags are the same picture by Noto: Bouvet Island flies Norway's.
        noto[seq] = picture((80, 80, 80) if "flag" in name else colour)
        write(root / f"fluent/assets/{code.lower()}.webp", picture((20 * n, 10, 30), kind="WEBP"))
        if "fox" not in name:
            write(root / f"twemoji/{code.lower().replace('-fe0f', '')}.svg", svg(f"rgb({20 * n},10,40)"))
    table = [
        {"hexcode": code, "group": group, "subgroups": "sub", "annotation": name, "tags": "one, two"}
        for code, group, name in TABLE
    ]
    write(root / "openmoji/data/openmoji.json", json.dumps(table))
    for language, word in (("en", "dog"), ("fr", "chien")):
        entry = {"annotations": {"annotations": {"🐶": {"tts": [word], "default": ["pet", "puppy"]}}}}
        write(root / f"names/annotations/{language}/annotations.json", json.dumps(entry))
    font = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000)
    font.setupGlyphOrder([".notdef"])
    font.setupCharacterMap({})
    font.save(root / "noto" / "NotoColorEmoji.ttf") if (root / "noto").mkdir() is None else None
    for folder in ("noto", "twemoji", "fluent", "openmoji", "names"):
        mark(root / folder)
    monkeypatch.setattr("mmfast.data.emoji.noto_glyphs", lambda font: noto)
    return tmp_path


def test_emoji_of_four_artists(emoji_cache):
    emoji = load_emoji(16, cache=emoji_cache, progress=False)
    assert " ".join(emoji.codepoints) == "1f600 1f436 1f468 1f468-200d-2695 1f1f3-1f1f4 1f1e7-1f1fb 1f1f3-1f1ff"
    assert emoji.names[:4] == ["grinning face", "dog", "man", "man health worker"]
    assert emoji.names[4:] == ["flag: Norway", "flag: Bouvet Island", "New Zealand"]
    assert emoji.keywords[1] == ["pet", "puppy"] and emoji.keywords[0] == ["one", "two"]
    # Noto's second flag is dropped; every other concept has four pictures.
    assert torch.bincount(emoji.artist).tolist() == [6, 7, 7, 7]
    assert emoji.images.shape == (27, 3, 16, 16) and emoji.images.dtype == torch.uint8
    for artist, blue in zip(ARTISTS, (10, 40, 30, 20), strict=True):
        for row in emoji.rows(artist).tolist():
            concept = int(emoji.concept[row])
            expected = [80, 80, 80] if artist == "noto" and concept == 4 else [20 * concept, 10, blue]
            assert emoji.images[row, :, 8, 8].tolist() == expected, (artist, concept)
    # Same first code point, same picture: one family each; flags that only share their first letter are apart.
    assert emoji.family.tolist() == [0, 1, 2, 2, 4, 4, 6]


def test_emoji_is_built_once_and_again_when_broken(emoji_cache):
    first = load_emoji(16, cache=emoji_cache, progress=False)
    (emoji_cache / "emoji/openmoji/data/openmoji.json").unlink()
    again = load_emoji(16, cache=emoji_cache, progress=False)
    assert again.images.equal(first.images) and again.names == first.names
    (emoji_cache / "built" / "emoji-16.safetensors").write_bytes(b"broken")
    with pytest.raises(FileNotFoundError):
        load_emoji(16, cache=emoji_cache, progress=False)
    assert sorted(p.name for p in (emoji_cache / "built").iterdir()) == ["emoji-16.json", "emoji-16.safetensors"]


def test_emoji_rows_and_names(emoji_cache):
    emoji = load_emoji(16, cache=emoji_cache, progress=False)
    assert sum(len(emoji.rows(split=s)) for s in ("train", "val", "test")) == len(emoji.images)
    rows = emoji.rows(("twemoji", "noto"), "train")
    assert set(emoji.artist[rows].tolist()) <= {0, 1}
    assert set(emoji.concept[rows].tolist()) == set(emoji.split["train"].tolist())
    with pytest.raises(ValueError, match="unknown artist 'apple'"):
        emoji.rows("apple")
    with pytest.raises(ValueError, match="unknown split"):
        emoji.rows(split="dev")
    assert emoji_names(emoji, "fr", cache=emoji_cache)[:2] == [None, "chien"]
    with pytest.raises(ValueError, match="expected one of en, fr"):
        emoji_names(emoji, "xx", cache=emoji_cache)
    with pytest.raises(ValueError, match="8 to 256"):
        load_emoji(4, cache=emoji_cache)


def test_noto_glyphs_inverts_ligatures():
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "man", "zwj", "health", "vs", "doctor", "blank"])
    builder.setupCharacterMap({0x1F468: "man", 0x200D: "zwj", 0x2695: "health", 0xFE0F: "vs"})
    builder.addOpenTypeFeatures("feature ccmp { sub man zwj health vs by doctor; } ccmp;")
    strike = {name: SimpleNamespace(imageData=name.encode()) for name in ("man", "doctor", "health")}
    tables = {"CBDT": SimpleNamespace(strikeData=[strike]), "GSUB": builder.font["GSUB"]}

    class Font(dict):
        def getBestCmap(self):
            return builder.font.getBestCmap()

    assert noto_glyphs(Font(tables)) == {
        (0x1F468,): b"man",
        (0x2695,): b"health",
        (0x1F468, 0x200D, 0x2695): b"doctor",
    }
    with pytest.raises(ValueError, match="no CBDT bitmaps"):
        noto_glyphs(Font())


def gradient(seed, size=(90, 60)):
    noise = torch.randint(0, 256, (6, 9, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return pillow.fromarray(noise.numpy()).resize(size, pillow.Resampling.BICUBIC)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def stamps_cache(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    root = tmp_path / "stamps" / "files"
    stamps = root / "stamps"

    def stamp(name, text, image=None, suffix=".png"):
        write(stamps / f"{name}.txt", text)
        if image is not None:
            write(stamps / f"{name}{suffix}", image)

    stamp("animals/fox", "A red fox.\nfr.utf8=Un renard.\nca@valencia.utf8= Una guineu \nde.utf8=\n", png(gradient(0)))
    stamp("animals/fox_copy", "Quite another caption.\n", png(gradient(0, (180, 120))))
    stamp("food/Fox", "a red FOX.\n", png(gradient(1)))
    stamp("food/tall", "Tall.\n", png(gradient(2, (30, 400))))
    stamp("space/star", "A star.\n", svg("#123456"), ".svg")
    stamp("space/broken", "Broken.\n", png(gradient(3))[:100])
    stamp("space/none", "No picture.\n")
    stamp("space/blank", "Blank.\n", png(pillow.new("RGB", (20, 20), (255, 255, 255))))
    stamp("symbols/alphabets/a", "The letter A.\n", png(gradient(4)))
    tone = torch.sin(torch.arange(22_050) / 10).numpy() * 0.1
    for name, rate in (("animals/fox", 22_050), ("food/tall", 44_100)):
        soundfile.write(stamps / f"{name}_desc_fr.ogg", tone, rate)
    write(stamps / "food/Fox_desc_fr.ogg", b"OggS, and nothing more")
    soundfile.write(stamps / "space/star_desc_ru.wav", tone[:4410], 44_100)
    mark(root)
    return tmp_path


def test_stamps_images_captions_and_what_is_skipped(stamps_cache):
    stamps = load_stamps(cache=stamps_cache, progress=False)
    assert stamps.names == ["animals/fox", "animals/fox_copy", "food/Fox", "food/tall", "space/star"]
    assert [tuple(x.shape) for x in stamps.images] == [
        (3, 60, 90), (3, 107, 160), (3, 60, 90), (3, 160, 12), (3, 160, 160),
    ]  # fmt: skip
    assert stamps.images[4][:, 80, 80].tolist() == [0x12, 0x34, 0x56]
    assert [stamps.classes[i] for i in stamps.label.tolist()] == ["animals", "animals", "food", "food", "space"]
    assert stamps.captions[0] == {"fr": "Un renard.", "ca@valencia": "Una guineu"}
    assert [line.partition(":")[0] for line in stamps.skipped] == ["space/blank", "space/broken", "space/none"]
    assert "cannot be used" in stamps.skipped[1]
    # The copy looks like the fox, the third has its caption in other letters: one group.
    assert stamps.group.tolist() == [0, 0, 0, 3, 4]
    assert not stamps.clips and stamps.mel.shape == (0, 80)


def test_stamps_speech(stamps_cache):
    stamps = load_stamps(True, languages=("fr", "ru"), cache=stamps_cache, progress=False)
    assert stamps.clips == [(0, "fr"), (3, "fr"), (4, "ru")]
    assert stamps.mel_offsets.tolist() == [0, 101, 101 + 51, 101 + 51 + 11]
    assert stamps.mel.dtype == torch.float16 and stamps.clip(1).shape == (51, 80)
    assert any(line.startswith("food/Fox_desc_fr.ogg: ") for line in stamps.skipped)
    rows = stamps.clip_rows("fr")
    assert rows.tolist() == [0, 1]
    assert sum(len(stamps.clip_rows(None, s)) for s in stamps.split) == 3
    # A second time nothing is decoded, and one language alone is the same.
    (stamps_cache / "stamps/files/stamps/animals/fox_desc_fr.ogg").unlink()
    alone = load_stamps(True, languages=("fr",), cache=stamps_cache, progress=False)
    assert alone.mel.equal(stamps.mel[:152])
    with pytest.raises(ValueError, match="no stamp is spoken in 'xx'"):
        load_stamps(True, languages=("xx",), cache=stamps_cache, progress=False)
    with pytest.raises(ValueError, match="no language code"):
        load_stamps(True, languages=("../../x",), cache=stamps_cache, progress=False)


def test_read_captions():
    text = "\ufeffA cat. 6x7=42\r\nfr.utf8=Un chat.\r\nen_GB.utf8=A cat.\nnot a line\n"
    assert read_captions(text) == ("A cat. 6x7=42", {"fr": "Un chat.", "en_GB": "A cat."})


def test_perceptual_hash_knows_a_smaller_copy_from_another_picture():
    one, small, other = (perceptual_hash(x) for x in (gradient(0), gradient(0).resize((45, 30)), gradient(1)))
    assert (one != small).sum() <= 5 and (one != other).sum() > 20


def test_groups_join_through_others():
    assert groups([{"a"}, {"b"}, {"c", "a"}, {"b", "c"}, set()]) == [0, 0, 0, 0, 4]


def test_no_group_is_in_two_splits_and_large_ones_train():
    group = [i // 3 for i in range(900)] + [1000] * 40
    split = split_by_group(group, [str(i) for i in range(940)], largest=20)
    places = {name: {group[i] for i in ids.tolist()} for name, ids in split.items()}
    assert not places["train"] & places["test"] and not places["train"] & places["val"]
    assert not places["val"] & places["test"] and 1000 in places["train"]
    assert sum(len(ids) for ids in split.values()) == 940


def need(name, built):
    if installed(name) is None or not (cache_dir() / "built" / built).is_file():
        pytest.skip(f"the {name} set is not in the cache: mmfast data install {name}")


def disjoint(group, split):
    places = [set(group[ids].tolist()) for ids in split.values()]
    return sum(len(p) for p in places) == len(set().union(*places))


def test_the_real_emoji():
    need("emoji", "emoji-64.json")
    emoji = load_emoji(progress=False)
    assert 1800 <= len(emoji.names) <= 1900 and len(set(emoji.names)) == len(emoji.names)
    assert (torch.bincount(emoji.artist, minlength=4) > 1800).all()
    assert disjoint(emoji.family, emoji.split) and len(emoji.split["train"]) > 1400 and len(emoji.split["test"]) > 180
    heart, grass = emoji.names.index("red heart"), emoji.names.index("four leaf clover")
    for artist in ARTISTS:
        rows = emoji.rows(artist)
        red = emoji.images[rows[emoji.concept[rows] == heart][0]][:, 24:40, 24:40].float().mean((1, 2))
        green = emoji.images[rows[emoji.concept[rows] == grass][0]].float().mean((1, 2))
        assert red[0] > red[1] + 60 and green[1] > green[0] + 2, artist


def test_the_real_stamps():
    need("stamps", "stamps-160.json")
    stamps = load_stamps(progress=False)
    assert 700 <= len(stamps.images) <= 1000 and len(stamps.skipped) < 20
    assert disjoint(stamps.group, stamps.split)
    captions = [{stamps.caption[i].lower() for i in ids.tolist()} for ids in stamps.split.values()]
    assert not captions[0] & captions[2] and not captions[0] & captions[1]
    assert max(max(x.shape) for x in stamps.images) == 160
    assert set(stamps.label.tolist()) == set(range(16))
