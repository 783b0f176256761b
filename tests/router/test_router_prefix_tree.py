"""The prefix tree against a slow model of it, and its bound."""

from hypothesis import given
from hypothesis import strategies as st

from router.prefix_tree import MAX_DROPPED, NODE_CHARS, PrefixTree, common_prefix_len

TEXTS = st.text(alphabet="abé漢", max_size=12)
HOLDERS = st.sampled_from(["w1", "w2", "w3"])


def common(a: str, b: str) -> int:
    return next((i for i in range(min(len(a), len(b))) if a[i] != b[i]), min(len(a), len(b)))


def test_matches_the_longest_prefix_and_its_last_holder():
    tree = PrefixTree(1000, 0)
    tree.insert("hello world", "w1")
    tree.insert("hello there", "w2")
    assert tree.match("hello world!") == (11, "w1")
    assert tree.match("hello thing") == (8, "w2")
    assert tree.match("hello") == (5, "w2")
    assert tree.match("bye") == (0, None)


def test_fork_inside_a_multibyte_character_cuts_between_characters():
    tree = PrefixTree(1000, 0)
    tree.insert("漢字", "w1")  # e6 bc a2 ...
    tree.insert("漠字", "w2")  # e6 bc a0 ...
    assert tree.match("漢") == (1, "w1") and tree.match("漠") == (1, "w2")


def test_only_usable_holders_are_matched():
    tree = PrefixTree(1000, 0)
    tree.insert("abcdef", "w1")
    tree.insert("abc", "w2")
    assert tree.match("abcdef", ["w2"]) == (3, "w2")


def test_eviction_drops_the_leaf_used_longest_ago():
    tree = PrefixTree(1000, 0)
    tree.insert("system one", "w1")
    tree.insert("system two", "w1")
    tree.insert("system one", "w1")
    tree.evict(10)
    assert tree.match("system one")[0] == 10 and tree.match("system two")[0] == 7


def test_tree_never_holds_more_than_its_bound():
    tree = PrefixTree(500, 0)
    for i in range(200):
        tree.insert(f"{i:03d}" * 20, f"w{i % 3}")
        tree.check()


def test_many_short_texts_count_for_what_their_nodes_take():
    tree = PrefixTree(100_000)
    for i in range(2000):
        tree.insert(f"{i:04d}", "w1")
    tree.check()
    assert 100 < tree.num_nodes - 1 < 100_000 / NODE_CHARS  # the root is held for nobody
    assert tree.match("1999") == (4, "w1") and tree.match("0500") == (0, None)


def test_full_tree_drops_no_more_at_once_than_comes_in():
    tree = PrefixTree(100_000)
    for i in range(2000):
        before = tree.num_nodes
        tree.insert(f"{i:04d}", "w1")
        assert tree.num_nodes >= before


def test_long_text_in_a_tree_of_short_ones_takes_their_place_bit_by_bit():
    tree = PrefixTree(2_000_000)
    for i in range(10_000):
        tree.insert(f"{i:04d}", f"w{i % 2}")
    before, held = tree.num_nodes, tree.total_chars
    tree.insert("x" * 600_000, "w1")
    tree.check()
    assert before - tree.num_nodes < MAX_DROPPED and tree.total_chars > tree.max_chars >= held
    for _ in range(2):  # later insertions or sweeps
        before = tree.num_nodes
        tree.evict(tree.max_chars)
        assert before - tree.num_nodes <= MAX_DROPPED
    assert tree.total_chars <= tree.max_chars
    assert tree.match("x" * 600_000) == (600_000, "w1") and tree.match("9999") == (4, "w1")


def test_text_longer_than_the_bound_is_not_kept():
    tree = PrefixTree(100, 0)
    tree.insert("x" * 1000, "w1")
    tree.check()
    assert tree.total_chars == 0


def test_removed_holder_leaves_nothing_behind():
    tree = PrefixTree(1000, 0)
    tree.insert("abcdef", "w1")
    tree.insert("abcxyz", "w2")
    tree.remove("w1")
    tree.check()
    assert tree.match("abcdef") == (3, "w2") and tree.total_chars == 6
    tree.remove("w2")
    assert tree.num_nodes == 1 and tree.total_chars == 0


@given(st.text(alphabet="ab", max_size=20), st.text(alphabet="ab", max_size=20), st.integers(0, 5))
def test_common_prefix_len_agrees_with_counting(edge, text, at):
    assert common_prefix_len(edge, text, at) == common(edge, text[at:])


@given(st.lists(st.tuples(TEXTS, HOLDERS), max_size=30), TEXTS)
def test_unbounded_tree_agrees_with_a_list_of_everything(inserted, text):
    tree = PrefixTree(10**9)
    for prompt, holder in inserted:
        tree.insert(prompt, holder)
        tree.check()
    longest = max((common(text, prompt) for prompt, _ in inserted), default=0)
    matched, holder = tree.match(text)
    assert matched == longest
    if matched:
        at_depth = [h for prompt, h in inserted if common(text, prompt) >= matched]
        assert holder in at_depth
    for wanted in ("w1", "w2"):
        matched, _ = tree.match(text, [wanted])
        assert matched == max((common(text, p) for p, h in inserted if h == wanted), default=0)


@given(
    st.lists(st.tuples(TEXTS, HOLDERS, st.integers(0, 3)), max_size=40), st.integers(0, 60), st.integers(0, 5)
)
def test_any_history_keeps_the_invariants(history, bound, node_chars):
    tree = PrefixTree(bound, node_chars)
    for prompt, holder, action in history:
        if action == 3:
            tree.remove(holder)
        elif action == 2:
            tree.evict(bound // 2)
            assert tree.total_chars <= bound // 2
        else:
            tree.insert(prompt, holder)
        tree.check()
