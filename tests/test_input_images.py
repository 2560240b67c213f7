"""Folders of images: order, labels, modes, sizes, streaming; and what is refused, by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs.images import open_images


def put(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path, **options)


def grey(value, shape=(4, 6)):
    return np.full(shape, value)


@pytest.fixture
def folder(tmp_path):
    """Two classes, five grey images of 4 x 6; each has one value."""
    for at, name in enumerate(("a/10.png", "a/9.png", "a/deep/1.png", "a-b/x.PNG", "a-b/y.bmp")):
        put(tmp_path / "in" / name, grey(10 * at))
    return tmp_path / "in"


def test_names_are_sorted_part_by_part_and_labels_follow_the_subfolders(folder):
    found = open_images(folder, labelled=True)
    # "a" comes before "a-b" as a part; as plain text "a-b/x" would stand before "a/10"
    assert found.names == ("a/10.png", "a/9.png", "a/deep/1.png", "a-b/x.PNG", "a-b/y.bmp")
    assert found.classes == ("a", "a-b") and found.labels.tolist() == [0, 0, 0, 1, 1]
    assert found.shape == (1, 4, 6) and len(found) == 5
    assert found.read([4, 0, 2])[:, 0, 0, 0].tolist() == [40, 0, 20]
    plain = open_images(folder)
    assert plain.names == found.names and plain.labels is None and plain.classes == ()


def test_batches_show_every_image_once_and_only_read_what_they_give(folder):
    found = open_images(folder)
    seen = list(found.batches(2))
    assert [len(index) for index, _ in seen] == [2, 2, 1] and torch.cat([i for i, _ in seen]).tolist() == list(range(5))
    assert torch.equal(torch.cat([x for _, x in seen]), found.load()) and found.load().dtype == torch.uint8
    mixed = torch.cat([i for i, _ in found.batches(2, rng=generator(0, "order"))])
    assert sorted(mixed.tolist()) == list(range(5))
    assert torch.equal(mixed, torch.cat([i for i, _ in found.batches(2, rng=generator(0, "order"))]))
    (folder / "a-b" / "y.bmp").unlink()
    assert len(next(found.batches(2))[0]) == 2  # the last image is not touched yet
    with pytest.raises(BadInput, match=r"y\.bmp"):
        list(found.batches(2))
    with pytest.raises(BadInput, match="at least 1"):
        next(found.batches(0))


def test_channels_rows_and_columns_stand_where_they_should(tmp_path):
    colour = np.zeros((2, 3, 3))
    colour[1, 2] = (1, 2, 3)
    put(tmp_path / "x.png", colour)
    x = open_images(tmp_path).load()
    assert x.shape == (1, 3, 2, 3) and x[0, :, 1, 2].tolist() == [1, 2, 3] and x.sum() == 6
    assert open_images(tmp_path, grey=True).shape == (1, 2, 3)
    put(tmp_path / "y.png", grey(7, (2, 3)))
    mixed = open_images(tmp_path).load()  # one in colour: all are read so
    assert mixed.shape == (2, 3, 2, 3) and (mixed[1] == 7).all()


def test_transparency_is_black_and_exif_turns(tmp_path):
    clear = np.full((2, 2, 4), 200)
    clear[0, 0, 3], clear[0, 1, 3] = 0, 255
    put(tmp_path / "a" / "x.png", clear)
    x = open_images(tmp_path / "a").load()
    assert x.shape == (1, 3, 2, 2) and x[0, :, 0, 0].tolist() == [0] * 3 and x[0, :, 0, 1].tolist() == [200] * 3
    tag = Image.Exif()
    tag[0x0112] = 6  # to be turned a quarter clockwise when shown
    put(tmp_path / "b" / "x.png", np.arange(6).reshape(2, 3), exif=tag)
    turned = open_images(tmp_path / "b")
    assert turned.shape == (1, 3, 2) and turned.load()[0, 0].tolist() == [[3, 0], [4, 1], [5, 2]]


def test_mixed_sizes_are_refused_unless_scaled(folder):
    put(folder / "a" / "odd.png", grey(9, (8, 4)))
    with pytest.raises(BadInput, match=r"odd\.png.*8 x 4.*4 x 6.*size"):
        open_images(folder)
    found = open_images(folder, size=(4, 4))
    assert found.shape == (1, 4, 4)
    assert found.load()[found.names.index("a/odd.png")].unique().tolist() == [9]
    assert open_images(folder, size=2).load().shape == (6, 1, 2, 2)
    for bad in (0, (3, -1)):
        with pytest.raises(BadInput, match="size"):
            open_images(folder, size=bad)


def test_scaling_covers_and_cuts_around_the_middle(tmp_path):
    put(tmp_path / "x.png", np.repeat(np.array([[0] * 3 + [100] * 3 + [0] * 3]), 3, axis=0))
    assert open_images(tmp_path, size=3).load().tolist() == [[[[100] * 3] * 3]]


def test_unreadable_images_are_named_and_skipped_only_if_asked(folder):
    (folder / "a" / "broken.png").write_bytes(b"not an image")
    whole = (folder / "a" / "9.png").read_bytes()
    put(folder / "a" / "cut.png", np.arange(24).reshape(4, 6) * 9)
    data = (folder / "a" / "cut.png").read_bytes()
    (folder / "a" / "cut.png").write_bytes(data[:-30])
    with pytest.raises(BadInput, match=r"broken\.png"):
        open_images(folder)
    found = open_images(folder, labelled=True, skip_unreadable=True)
    assert [name for name, _ in found.skipped] == ["a/broken.png", "a/cut.png"] and all(why for _, why in found.skipped)
    assert len(found) == 5 and (folder / "a" / "9.png").read_bytes() == whole
    headers = open_images(folder, skip_unreadable=True, verify=False)  # the header of the cut one is whole
    assert [name for name, _ in headers.skipped] == ["a/broken.png"]
    with pytest.raises(BadInput, match=r"cut\.png"):
        headers.load()
    for path in folder.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(BadInput, match="no image.*7 unreadable"):
        open_images(folder, skip_unreadable=True)


def test_more_than_eight_bits_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 1000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(BadInput, match=r"deep\.png.*8 bits"):
        open_images(tmp_path)


def test_folders_that_say_nothing_are_refused(tmp_path, folder):
    with pytest.raises(BadInput, match="no such folder"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    put(tmp_path / "empty" / ".hidden.png", grey(1))
    put(tmp_path / "empty" / ".cache" / "x.png", grey(1))
    with pytest.raises(BadInput, match="no image"):
        open_images(tmp_path / "empty")
    put(folder / "stray.png", grey(1))
    with pytest.raises(BadInput, match=r"stray\.png.*no class"):
        open_images(folder, labelled=True)
    (folder / "stray.png").unlink()
    (folder / "c").mkdir()
    with pytest.raises(BadInput, match="c: a class without"):
        open_images(folder, labelled=True)


def test_an_error_is_one_line_whatever_the_name(tmp_path):
    (tmp_path / "two\nlines.png").write_bytes(b"")
    with pytest.raises(BadInput) as error:
        open_images(tmp_path)
    assert "\n" not in str(error.value) and r"two\nlines.png" in str(error.value)
