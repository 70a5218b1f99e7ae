"""Reading images and captions, valid and broken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import write_photos
from PIL import Image, ImageCms

from nora_diffusion.data import find_images, read_images, read_source, survey
from nora_diffusion.data.captions import guess_trigger, with_trigger
from nora_diffusion.data.colors import color
from nora_diffusion.data.formats import sniff
from nora_diffusion.errors import UserError
from nora_diffusion.training.data.latents import _encode

RED, BLUE = (200, 30, 40), (20, 40, 210)


def halves(mode: str = "RGB") -> Image.Image:
    """40 x 20 pixels, red on the left and blue on the right."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    return image.convert(mode)


def close(pixel: object, expected: tuple[int, int, int], tolerance: int = 12) -> bool:
    return bool(np.abs(np.asarray(pixel, dtype=int) - np.asarray(expected)).max() <= tolerance)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    halves().save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    image = read_source(tmp_path / "rotated.jpg").image
    assert image.size == (20, 40)
    assert close(image.getpixel((10, 5)), RED) and close(image.getpixel((10, 35)), BLUE)


def test_color_modes_become_rgb(tmp_path: Path) -> None:
    halves("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    halves("P").save(tmp_path / "palette.png")
    halves().save(tmp_path / "plain.webp", quality=95)
    halves().save(tmp_path / "misnamed.jpg", format="PNG")
    halves().save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[halves()], quality=95)
    for photo in read_images(tmp_path):
        assert photo.image.mode == "RGB"
        assert close(photo.image.getpixel((5, 10)), RED, 40), photo.path.name


@pytest.mark.parametrize("level", [0, 200, 257, 32768, 65535])
def test_sixteen_bits_are_scaled(tmp_path: Path, level: int) -> None:
    """By the format's range, not by the brightest pixel."""
    Image.fromarray(np.full((20, 20), level, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_source(tmp_path / "deep.png").image.getpixel((3, 3)) == (round(level / 65535 * 255),) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_gives_the_same_image(tmp_path: Path, orientation: int) -> None:
    """Stored in each of the eight orientations, the image is always read upright."""
    stored = {
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270],
    }  # fmt: skip
    image = halves()
    for transpose in stored[orientation]:
        image = image.transpose(transpose)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo.png", exif=exif)
    photo = read_source(tmp_path / "photo.png")
    assert photo.image.tobytes() == halves().tobytes()
    assert any("EXIF" in remark for remark in photo.remarks) == (orientation > 1)


def test_a_profile_is_applied_with_and_without_transparency(tmp_path: Path) -> None:
    """A profile that swaps red and blue gives the same colors with and without an alpha channel."""
    profile = swapping_profile()
    halves().save(tmp_path / "plain.png", icc_profile=profile)
    layers = halves("RGBA")
    layers.putpixel((0, 0), (0, 0, 0, 0))
    layers.save(tmp_path / "layers.png", icc_profile=profile)
    plain, composed = (read_source(tmp_path / name).image for name in ("plain.png", "layers.png"))
    assert close(plain.getpixel((5, 5)), (40, 30, 200), 25)
    assert plain.getpixel((5, 5)) == composed.getpixel((5, 5)) and composed.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_broken_profile_is_ignored_with_a_remark(tmp_path: Path, mode: str) -> None:
    halves(mode).save(tmp_path / "photo.png", icc_profile=b"not a profile")
    halves(mode).save(tmp_path / "plain.png")
    broken, plain = (read_source(tmp_path / name) for name in ("photo.png", "plain.png"))
    assert broken.image.tobytes() == plain.image.tobytes() and not plain.remarks
    assert broken.remarks == ("its color profile is broken, so its colors are taken as sRGB",)


def swapping_profile() -> bytes:
    """sRGB with its red and blue primaries swapped."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = data.index(b"rXYZ"), data.index(b"bXYZ")
    data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(data)


def test_transparency_becomes_white_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layer = halves("RGBA")
    layer.paste((0, 0, 0, 0), (0, 0, 20, 20))
    layer.save(tmp_path / "clear.png")
    image = read_source(tmp_path / "clear.png").image
    assert close(image.getpixel((5, 5)), (255, 255, 255), 0) and close(image.getpixel((30, 5)), BLUE, 0)
    assert "clear.png is partly transparent" in caplog.text


def test_transparency_is_filled_with_the_chosen_background(tmp_path: Path) -> None:
    layer = halves("RGBA")
    layer.paste((0, 0, 0, 0), (0, 0, 20, 20))
    layer.putpixel((30, 5), (*BLUE, 128))
    layer.save(tmp_path / "clear.png")
    photo = read_source(tmp_path / "clear.png", color("#204060"))
    assert photo.image.getpixel((5, 5)) == (32, 64, 96) and photo.image.getpixel((35, 5)) == BLUE
    mixed = tuple(round((b * 128 + g * 127) / 255) for b, g in zip(BLUE, (32, 64, 96), strict=True))
    assert close(photo.image.getpixel((30, 5)), mixed, 1)
    assert photo.alpha is not None and [photo.alpha.getpixel((x, 5)) for x in (5, 30, 35)] == [0, 128, 255]
    with pytest.raises(UserError, match="background='blurple' is not a color"):
        color("blurple")


def test_palette_transparency(tmp_path: Path) -> None:
    palette = halves("P")
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((5, 5)))
    image = read_source(tmp_path / "p.png", (0, 0, 0)).image
    assert image.getpixel((5, 5)) == (0, 0, 0) and close(image.getpixel((30, 5)), BLUE, 40)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x00\x00\x00\x1cftypheic" + bytes(16), "HEIC"),
        (b"\x00\x00\x00\x1cftypmif1\x00\x00\x00\x00mif1heic", "HEIC"),
        (b"\x00\x00\x00\x1cftypavif" + bytes(16), "AVIF"),
        (b"GIF89a", "GIF"),
        (b"II*\x00", "TIFF"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "WEBP"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", None),
        (b"PK\x03\x04", None),
        (b"", None),
    ],
)
def test_formats_are_recognized_by_their_first_bytes(content: bytes, expected: str | None) -> None:
    assert sniff(content) == expected


def test_formats_are_recognized_without_their_suffix(tmp_path: Path) -> None:
    halves().save(tmp_path / "no_suffix", format="JPEG", quality=95)
    halves().save(tmp_path / "odd.jfif", format="WEBP", quality=95)
    halves().save(tmp_path / "animation.jpg", format="GIF")
    (tmp_path / "notes.txt").write_text("a caption")
    photos, rejects = survey(tmp_path)
    assert [photo.path.name for photo in photos] == ["no_suffix", "odd.jfif"]
    assert [r.reason for r in rejects] == ["animation.jpg is GIF, which cannot be read: export it as JPEG or PNG"]


def test_heic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read upright, reduced if it is large; without its decoder the error names a remedy."""
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif has no wheel for this platform")
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("phone.HEIC", "renamed.jpg"):
        heif.from_pillow(halves()).save(tmp_path / name, format="HEIF", quality=95, exif=exif.tobytes())
    for limit in (1000, 300):
        monkeypatch.setattr("nora_diffusion.data.formats.MAX_PIXELS", limit)
        for photo in read_images(tmp_path):
            scale = 1 if limit == 1000 else 2
            assert photo.image.size == (20 // scale, 40 // scale) and photo.image.mode == "RGB"
            assert close(photo.image.getpixel((10 // scale, 5 // scale)), RED, 16)
            assert close(photo.image.getpixel((10 // scale, 35 // scale)), BLUE, 16)
    (tmp_path / "cut.heic").write_bytes((tmp_path / "phone.HEIC").read_bytes()[:-100])
    assert [r.reason for r in survey(tmp_path)[1]] == ["cut.heic is damaged or truncated"]
    monkeypatch.setattr("nora_diffusion.data.formats.can_read_heic", lambda: False)
    with pytest.raises(UserError, match=r"phone.HEIC is a HEIC image: export it as JPEG, or install its decoder"):
        read_source(tmp_path / "phone.HEIC")


def test_file_names_with_any_characters(tmp_path: Path) -> None:
    names = ["mein hund.jpg", "собака.png", "犬 🐕.webp", "x" * 200 + ".png"]
    for name in names:
        halves().save(tmp_path / name)
    assert sorted(photo.path.name for photo in read_images(tmp_path)) == sorted(names)


def test_one_error_names_all_broken_files(tmp_path: Path) -> None:
    write_photos(tmp_path, 1)
    halves().save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:300])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.png").write_text("<html>not found</html>")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (5000, 20)).save(tmp_path / "strip.png")
    with pytest.raises(UserError) as error:
        read_images(tmp_path, workers=2)
    for words in ("cut.jpg is damaged", "empty.png is empty", "page.png is not a JPEG", "dot.png is 1x1", "5000x20"):
        assert words in str(error.value)
    assert "0.png" not in str(error.value)


def test_size_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves().save(tmp_path / "large.png")
    monkeypatch.setattr("nora_diffusion.data.images.MAX_DECODER_BYTES", 100)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"large.png is 40x20: 0 megapixels need too much memory, so save a smaller"):
        read_source(tmp_path / "large.png")


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_images(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="no photos in"):
        find_images(tmp_path)


def test_guessing_triggers() -> None:
    assert guess_trigger("a photo of sks dog") == "sks"
    assert guess_trigger("a photo of sks dog", class_word="dog") == "sks"
    assert guess_trigger("a photo of dog sks", class_prompt="a photo of a dog") == "sks"
    assert guess_trigger("a photo of a dog") is None
    assert guess_trigger("a professional photo of sks dog") == guess_trigger("ein Foto von sks Hund") == "sks"
    assert guess_trigger("a photo of my dog tqz") == "tqz" and guess_trigger("a photo of a big tok3 dog") == "tok3"
    assert guess_trigger("an oil painting of bobo cat") == "bobo" and guess_trigger("a selfie of bobo man") == "bobo"
    assert guess_trigger("a photo of <ohwx>") == guess_trigger("<ohwx> dog on grass") == "<ohwx>"
    assert guess_trigger("a photo of a dog", class_word="dog") is None
    assert with_trigger("a red toy dog in snow", "sks", "toy dog") == "a red sks toy dog in snow"
    assert with_trigger("a sks dog", "sks", "dog") == "a sks dog"
    assert with_trigger("the beach", "sks", "dog") == "sks dog, the beach"
    assert with_trigger("the beach", "sks", None) == "sks, the beach"


@pytest.mark.parametrize(("side", "views"), [(16, [4, 2]), (512, [4, 2]), (640, [2, 2, 2]), (1024, [1] * 6)])
def test_large_views_go_through_the_vae_in_smaller_batches(side: int, views: list[int]) -> None:
    sizes: list[int] = []

    class Vae:
        device, dtype = torch.device("cpu"), torch.float32

        def encode(self, chunk: torch.Tensor) -> SimpleNamespace:
            sizes.append(len(chunk))
            latent = chunk[:, :, ::64, ::64]
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=latent, std=latent))

    pixels = np.zeros((6, 3, side, side), np.float32)
    assert len(_encode(Vae(), pixels)["mean"]) == 6
    assert sizes == views
