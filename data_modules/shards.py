"""The shard format: one tar sample is one image with all its instances, and an index beside the tars.

Layout of one sample::

    <key>.json               width, height, instances (id, target, kind, phrases, category, ...), free extra fields
    <key>.jpg|.png|.webp     the image, its bytes as they were where possible
    <key>.<i>.alpha.png      8- or 16-bit alpha of instance i, already accounting for what lies in front of it
    <key>.<i>.mask.png       or its hard mask, 0 and 255
    <key>.<i>.foreground.png optional, RGB foreground colours
    <key>.background.jpg     optional, the background without the instances

Why an index: a sample is read by its byte offset, so a stream can start anywhere (exact resume) without unpacking what
lies before. The tars stay ordinary webdataset shards: `webdataset.WebDataset("train-{000000..000009}.tar")` reads them.
"""

from data_modules.shard_format import FORMAT, IMAGE_EXTENSIONS, Phrase, ShardInfo, describe_shard
from data_modules.shard_location import ShardsMissing, expand_braces, is_url
from data_modules.shard_reader import Instance, RawSample, SampleError, ShardIndex
from data_modules.shard_writer import InstanceEntry, ShardFile, ShardWriter, sample_members, write_index

__all__ = [
    "FORMAT",
    "IMAGE_EXTENSIONS",
    "Instance",
    "InstanceEntry",
    "Phrase",
    "RawSample",
    "SampleError",
    "ShardFile",
    "ShardIndex",
    "ShardInfo",
    "ShardWriter",
    "ShardsMissing",
    "describe_shard",
    "expand_braces",
    "is_url",
    "sample_members",
    "write_index",
]
