"""Frames of real files, written with PyAV, against the rule that names them."""

from __future__ import annotations

import gc
import json
import struct
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from cache_store.contract import FieldSpec
from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import EncodeUnit
from diffsynth_pipe.data.samples import list_samples
from diffsynth_pipe.data.videos import load_video, read_video_size
from diffsynth_pipe.errors import ConfigError, DataError
from diffsynth_pipe.stages.encode import map_ahead

STEP = 12
UNITS = (
    EncodeUnit(
        name="latents",
        inputs=("video",),
        outputs=(FieldSpec(name="latents", dtype="float32", dims=("x",)),),
        component=None,
        encode=dict,
        media={"video": "video"},
    ),
)


def write_video(path, num_frames, *, codec="libx264", rate=8, times_ms=None, pix_fmt="yuv420p", options=None):
    """Write frames of 64x48 px whose grey is STEP times their number; ``times_ms`` are when they are shown."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        if times_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number * STEP, np.uint8), format="rgb24")
            if times_ms:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frames_of(path, num_frames=81, frame_rate=None):
    """Return the numbers of the frames that a clip has."""
    size = read_video_size(path, num_frames, frame_rate, apply_exif=True)
    clip = load_video(path, 48, 64, size.num_frames, frame_rate, apply_exif=True)
    assert (size.width, size.height, clip.dtype) == (64, 48, np.uint8)
    return [round(float(frame.mean()) / STEP) for frame in clip]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mov", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("b.webm", "libvpx")],
)
def test_the_first_frames_are_taken(name, codec, tmp_path):
    path = write_video(tmp_path / name, 20, codec=codec)
    assert frames_of(path, 9) == list(range(9))
    assert frames_of(path, 17) == list(range(17))


@pytest.mark.parametrize(("there", "taken"), [(1, 1), (4, 1), (5, 5), (8, 5), (20, 17)])
def test_a_shorter_video_gives_a_multiple_of_4_plus_1(there, taken, tmp_path):
    assert frames_of(write_video(tmp_path / "a.mp4", there)) == list(range(taken))


def test_where_each_frame_has_a_latent_frame_all_are_taken(tmp_path):
    stills = [Image.new("RGB", (32, 32), (number * 30, 0, 0)) for number in range(8)]
    stills[0].save(tmp_path / "a.gif", save_all=True, append_images=stills[1:])
    for path in (write_video(tmp_path / "a.mp4", 8), tmp_path / "a.gif"):
        for num_frames, taken in ((7, 7), (81, 8)):
            assert read_video_size(path, num_frames, None, 1, apply_exif=True).num_frames == taken


def test_ten_bits_become_eight(tmp_path):
    assert frames_of(write_video(tmp_path / "a.mp4", 9, pix_fmt="yuv420p10le")) == list(range(9))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize(("raw_fps", "frame_rate", "num_frames"), [(8, 4, 9), (8, 16, 9), (10, 4, 5), (8, 3, 5)])
def test_at_a_fixed_rate_the_frames_are_those_of_the_reference(name, raw_fps, frame_rate, num_frames, tmp_path):
    path = write_video(tmp_path / name, 20, rate=raw_fps)
    expected = [min(round(i / frame_rate * raw_fps), 19) for i in range(num_frames)]
    assert frames_of(path, num_frames, frame_rate) == expected


def test_a_fixed_rate_shortens_to_the_duration(tmp_path):
    path = write_video(tmp_path / "a.mp4", 20)  # 2.5 s
    assert len(frames_of(path, 81, 4.0)) == 9  # 10 periods
    assert len(frames_of(path, 81, 16.0)) == 37  # 40 periods


def test_timestamps_decide_where_the_frame_rate_varies(tmp_path):
    times_ms = [0, 40, 80, 500, 1000, 2600]
    path = write_video(tmp_path / "a.mkv", 6, times_ms=times_ms)
    # nearest to 0, 250, ... 2000 ms; 750 ms is as near to 500 as to 1000
    assert frames_of(path, 9, 4.0) == [0, 2, 3, 4, 4, 4, 4, 4, 5]
    assert frames_of(path, 5) == [0, 1, 2, 3, 4]


def test_sound_that_outlasts_the_frames_adds_none(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w", options={"max_interleave_delta": "1"}) as container:
        sound = container.add_stream("aac", rate=44100)
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100 * 2), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        sounds = [*sound.encode(silence), *sound.encode()]
        frames = [
            av.VideoFrame.from_ndarray(np.full((48, 64, 3), n * STEP, np.uint8), format="rgb24") for n in range(9)
        ]
        shown = [packet for frame in (*frames, None) for packet in stream.encode(frame)]
        for packet in (*shown[:8], *sounds, shown[8]):
            packet.stream = stream if packet in shown else sound
            container.mux_one(packet)
    assert read_video_size(path, 81, 8.0, apply_exif=True).num_frames == 9


def test_an_avi_may_have_dropped_frames(tmp_path):
    path = write_video(tmp_path / "a.avi", 6, codec="mpeg4", times_ms=[0, 125, 250, 375, 750, 875])
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > 6
    assert frames_of(path) == [0, 1, 2, 3, 4]


def test_a_gif_is_a_video_and_an_image_one_frame(tmp_path):
    frames = [Image.new("RGB", (64, 48), (number * STEP,) * 3) for number in range(7)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[3].save(tmp_path / "a.png")
    assert frames_of(tmp_path / "a.gif") == [0, 1, 2, 3, 4]
    assert frames_of(tmp_path / "a.gif", 5, 20.0) == [0, 0, 1, 2, 2]  # 10 a second; halves to the even one
    gif, png = listed(tmp_path, ["a.gif", "a.png"])
    assert (gif.bucket, png.bucket) == ("48x64x5", "48x64x1")
    still = png.inputs["video"].load()
    assert still.shape == (1, 48, 64, 3)
    assert (still == 3 * STEP).all()


def test_a_video_that_lies_on_its_side_is_turned_upright(tmp_path):
    """Phones write the matrix (0 1 -1 0) for frames that are to be turned a quarter clockwise."""
    path = tmp_path / "a.mp4"
    left_white = np.zeros((48, 64, 3), np.uint8)
    left_white[:, :32] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(left_white, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    matrix = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = data.index(matrix, data.index(b"tkhd"))
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    size = read_video_size(path, 1, None, apply_exif=True)
    assert (size.width, size.height) == (48, 64)
    upright = load_video(path, 64, 48, 1, apply_exif=True)[0]
    assert upright[:24].mean() > 250  # what was left is above
    assert upright[40:].mean() < 5
    as_stored = load_video(path, 48, 64, 1, apply_exif=False)[0]
    assert as_stored[:, :24].mean() > 250


def audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def without_frames(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


def cut(path, share, *, index_first=True):
    write_video(path, 20, options={"movflags": "faststart"} if index_first else {})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def cut_gif(path):
    frames = [Image.effect_noise((64, 48), number) for number in range(7)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    path.write_bytes(path.read_bytes()[:-2000])


BROKEN = {
    "audio.mp4": (audio, "has no video stream"),
    "empty.mp4": (without_frames, "has no video stream"),
    "empty.mkv": (without_frames, "is not a whole video"),
    "index_lost.mp4": (lambda path: cut(path, 0.6, index_first=False), "has no video stream"),
    "cut.mp4": (lambda path: cut(path, 0.95), r"is not a whole video that can be decoded \(frame \d+ is cut off\)"),
    "cut.mkv": (lambda path: cut(path, 0.6), r"holds no frame|its last \d+ bytes are cut off"),
    "cut_late.mkv": (lambda path: cut(path, 0.99), r"its last \d+ bytes are cut off"),
    "cut.gif": (lambda path: cut_gif(path), "is not an image that can be decoded"),
    "nothing.mp4": (lambda path: path.touch(), "is not a whole video"),
    "text.webm": (lambda path: path.write_text("hello"), "is not a whole video"),
    "missing.mp4": (lambda _: None, "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_in_one_line(name, tmp_path):
    make, message = BROKEN[name]
    make(tmp_path / name)
    write_video(tmp_path / "good.mp4", 5)
    with pytest.raises(DataError, match=rf"^metadata\.json row 2 \({name}\): .*{name}: .*({message})") as caught:
        listed(tmp_path, ["good.mp4", name])
    assert "\n" not in str(caught.value)
    assert any(cure in str(caught.value) for cure in ("replace or remove it", "check dataset_base_path"))


def test_a_file_that_changed_is_refused(tmp_path):
    (sample,) = listed(tmp_path, [write_video(tmp_path / "a.mp4", 5).name])
    write_video(tmp_path / "a.mp4", 6)
    with pytest.raises(DataError, match=r"^metadata\.json row 1 \(a\.mp4\): .*changed since it was listed"):
        sample.inputs["video"].load()


def listed(folder, names, **parameters):
    (folder / "metadata.json").write_text(json.dumps([{"video": name} for name in names]))
    settings = {"dataset_base_path": str(folder), "dataset_metadata_path": str(folder / "metadata.json"), **parameters}
    return list_samples(load_config(None, settings), UNITS, 16)


def test_bucket_id_and_digest_tell_clips_apart(tmp_path):
    write_video(tmp_path / "a.mp4", 20)
    (nine,) = listed(tmp_path, ["a.mp4"], num_frames=9)
    (five,) = listed(tmp_path, ["a.mp4"], num_frames=5)
    (slow,) = listed(tmp_path, ["a.mp4"], num_frames=5, fix_frame_rate=True, frame_rate=2)
    assert [sample.bucket for sample in (nine, five, slow)] == ["48x64x9", "48x64x5", "48x64x5"]
    assert len({sample.inputs["video"].digest for sample in (nine, five, slow)}) == 3
    assert len({sample.sample_id for sample in (nine, five, slow)}) == 1
    (small,) = listed(tmp_path, ["a.mp4"], num_frames=5, height=16, width=32)
    assert small.bucket == "16x32x5"
    assert small.inputs["video"].load().shape == (5, 16, 32, 3)
    assert [int(frame.mean()) // STEP for frame in slow.inputs["video"].load() + 3] == [0, 4, 8, 12, 16]


def test_a_number_of_frames_that_no_latents_have_is_refused(tmp_path):
    write_video(tmp_path / "a.mp4", 5)
    with pytest.raises(ConfigError, match=r"^num_frames: 80 is not a multiple of 4 plus 1; use 81"):
        listed(tmp_path, ["a.mp4"], num_frames=80)


def test_parameters_of_videos_are_refused_where_none_is_read(photos):
    settings = {"dataset_base_path": str(photos), "dataset_metadata_path": str(photos / "metadata.csv")}
    units = (EncodeUnit(name="x", inputs=("image",), outputs=(), component=None, encode=dict),)
    for change in ({"num_frames": 5}, {"fix_frame_rate": True}, {"framewise_decoding": True}):
        with pytest.raises(ConfigError, match=rf"^{next(iter(change))}: has no effect with family 'qwen_image'"):
            list_samples(load_config(None, {**settings, **change}), units, 16)


class Clip:
    """Something that can be counted while it is alive."""


@pytest.mark.parametrize("num_threads", [1, 3])
def test_one_clip_per_worker_and_the_one_that_is_encoded_are_alive(num_threads):
    alive: weakref.WeakSet[Clip] = weakref.WeakSet()
    most = 0

    def load(_):
        nonlocal most
        clip = Clip()
        alive.add(clip)
        gc.collect()
        most = max(most, len(alive))
        return clip

    for _, clip in map_ahead(load, range(40), num_threads, num_threads):
        most = max(most, len(alive))
        del clip
    assert num_threads <= most <= num_threads + 1
