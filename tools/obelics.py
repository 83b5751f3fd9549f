"""Bring the images of OBELICS, which are published as URLs, to where tools.pack finds them.

    python -m tools.obelics obelics/data --urls urls.tsv
    img2dataset --url_list urls.tsv --input_format tsv --output_format files \\
        --output_folder fetched --image_size 256 --resize_mode keep_ratio
    python -m tools.obelics obelics/data --fetched fetched
    python -m tools.pack --interleaved obelics/data ...

The first command lists the URLs that the parquet files of a folder name. The third moves each image
that img2dataset has fetched to images/ in that folder, under a name that follows from its URL. So
no list of hundreds of millions of URLs has to be in memory, and you may stop the command and give
it again. Needs the package pyarrow.
"""
import shutil
from pathlib import Path

from tqdm import tqdm

from data import check
from tools import need
from tools.pack import file_of_url
from train import Parser, write_whole


def batches(folder, columns, remedy):
    """Yields (file, {column: values}) of some thousand rows of a folder's parquet files at a time.
    SystemExit, in one line, if there are no such files, or if a file lacks a column."""
    parquet, files = need("pyarrow.parquet", "pyarrow"), sorted(folder.glob("*.parquet"))
    check(files, f"{folder} has no .parquet file: {remedy}")
    for path in tqdm(files, "files", disable=None):
        try:
            file = parquet.ParquetFile(path)
        except ValueError as error:  # a download was cut, or img2dataset is still writing
            raise SystemExit(f"{path} is no whole parquet file ({error}): wait until it is, or "
                             "delete it") from None
        check({*columns} <= {*file.schema_arrow.names}, f"{path} has no column "
              f"{' or no '.join(columns)}: {remedy}")
        for batch in file.iter_batches(4096, columns=columns):
            yield path, batch.to_pydict()


def list_urls(folder, out):
    """Writes the URLs in a folder's parquet files to a file, one a line; returns their number."""
    def write(path):
        nonlocal n
        with open(path, "w", encoding="utf-8") as file:
            file.write("url\n")  # a tsv, because img2dataset would split a line of txt at commas
            for _, rows in batches(folder, ["images"], "name the folder of OBELICS' data"):
                urls = dict.fromkeys(url for images in rows["images"] for url in images if url)
                file.writelines(f"{url}\n" for url in urls)
                n += len(urls)

    n = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, write)
    return n


def take_images(folder, fetched):
    """Moves the images that img2dataset wrote as files to folder/images. Beside each folder of such
    images lies a parquet file, which says the URL of each image. Returns how many images are in
    folder/images now, and how many were asked for."""
    n, here, remedy = 0, 0, "name the --output_folder of img2dataset"
    for path, rows in batches(fetched, ["url", "key"], remedy):
        for url, key in zip(rows["url"], rows["key"]):
            image = path.with_suffix("") / f"{key}.jpg"
            place = folder / "images" / file_of_url(url)
            if image.is_file():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(image, place)  # to another disk, too
            n, here = n + 1, here + place.is_file()
    return here, n


def main(argv=None):
    parser = Parser(prog="python -m tools.obelics", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the parquet files of OBELICS lie")
    step = parser.add_mutually_exclusive_group(required=True)
    step.add_argument("--urls", type=Path, metavar="FILE", help="list the URLs of images here")
    step.add_argument("--fetched", type=Path, help="take the images from this folder")
    args = parser.parse_args(argv)
    if args.urls:
        print(f"{list_urls(args.folder, args.urls):,} URLs in {args.urls}")
    else:
        here, n = take_images(args.folder, args.fetched)
        print(f"{here:,} of {n:,} images are in {args.folder / 'images'}; tools.pack skips and "
              "counts the others")


if __name__ == "__main__":
    main()
