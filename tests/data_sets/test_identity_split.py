from collections import defaultdict
from pathlib import Path

import pytest

from qsd_plugin.data.identity_split import draw_queries, draw_split
from qsd_plugin.data.items import ImageItem

ROOT = Path("data")


def images(identity, cameras):
    return [ImageItem(f"data/{identity}/{index}.jpg", identity, camera) for index, camera in enumerate(cameras)]


def people(count, per_person=6):
    return [item for number in range(count) for item in images(f"p{number:03d}", [None] * per_person)]


def test_no_identity_is_in_both_parts_and_no_image_is_lost():
    items = people(40)
    splits = draw_split(items, test_fraction=0.25, seed=1, root=ROOT)
    trained, tested = ({item.identity for item in part} for part in (splits.train, splits.query + splits.gallery))
    assert len(tested) == 10
    assert trained.isdisjoint(tested)
    assert sorted(splits.train + splits.query + splits.gallery) == sorted(items)


def test_split_depends_on_the_seed_and_not_on_the_order_of_the_files():
    items = people(40)
    split = draw_split(items, test_fraction=0.5, seed=1, root=ROOT)
    assert draw_split(items[::-1], test_fraction=0.5, seed=1, root=ROOT) == split
    assert draw_split(items, test_fraction=0.5, seed=2, root=ROOT) != split


def test_an_identity_keeps_its_queries_when_others_come_and_go():
    few, many = people(10), people(30)
    queries, _ = draw_queries(few, seed=0)
    assert set(queries) <= set(draw_queries(many, seed=0)[0])


def test_identities_that_cannot_be_found_are_trained_on():
    once = [item for number in range(20) for item in images(f"once{number}", [None])]
    splits = draw_split(once + people(5), test_fraction=0.5, seed=0, root=ROOT)
    assert {item.identity for item in once} <= {item.identity for item in splits.train}
    assert len({item.identity for item in splits.query}) == 5


def test_one_camera_is_not_enough_where_cameras_are_known():
    items = images("same", ["1", "1", "1"]) + images("moved", ["1", "2"]) + images("also", ["3", "4", "4"])
    splits = draw_split(items, test_fraction=0.9, seed=0, root=ROOT)
    assert {item.identity for item in splits.train} == {"same"}


@pytest.mark.parametrize("cameras", ["12", "112", "1122", "123", "111222333", "1111111112"])
@pytest.mark.parametrize("seed", range(5))
def test_every_query_has_a_match_from_another_camera(cameras, seed):
    query, gallery = draw_queries(images("p", list(cameras)), seed=seed)
    assert query
    assert all(any(other.camera != item.camera for other in gallery) for item in query)
    assert len(query) + len(gallery) == len(cameras)


def test_one_query_from_each_camera_that_can_spare_it():
    query, _ = draw_queries(images("p", list("111222333")), seed=0)
    assert sorted(str(item.camera) for item in query) == ["1", "2", "3"]


@pytest.mark.parametrize(("count", "queries"), [(2, 1), (7, 1), (8, 2), (12, 3)])
def test_a_quarter_is_searched_where_cameras_are_unknown(count, queries):
    query, gallery = draw_queries(people(1, count), seed=0)
    assert (len(query), len(gallery)) == (queries, count - queries)


def test_gallery_keeps_identities_that_cannot_be_found():
    query, gallery = draw_queries(images("once", [None]), seed=0)
    assert (query, len(gallery)) == ([], 1)


def test_every_identity_is_held_out_equally_often():
    times = defaultdict(int)
    for seed in range(400):
        for item in draw_split(people(8, 2), test_fraction=0.25, seed=seed, root=ROOT).query:
            times[item.identity] += 1
    assert sum(times.values()) == 800
    assert all(65 < count < 135 for count in times.values())  # 100 expected, 4 standard deviations
