"""What the data set tab knows and asks, in a browser with a server of its own making: answers that are late or lost."""

import pytest

from tests.app_browser import chromium, opened, served  # noqa: F401 - a fixture

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("app") / "w") as running:
        yield running


LISTS = """async ({ isOther }) => {
    const waiting = [];
    const answer = ({ id, search }) => ({ names: [`${id}${search}.png`], cards: [] });
    const server = {
        list_images: (query) => new Promise((done) => waiting.push(() => done(answer(query)))),
        read_info: () => ({ tag: "", undo: null, redo: null }),
    };
    const listed = [];
    const hooks = { leave: () => true, listed: (_, isNew) => listed.push([...store.names, isNew]), state: () => {} };
    const store = new Studio.SetStore(server, hooks);
    const turns = [];
    const opened = (id) => store.open(id).then(() => turns.push(store.names[0]));
    const first = opened("a");
    while (waiting.length < 1) await null;
    const second = isOther ? opened("b") : (store.query.search = "x", store.list(false));
    while (waiting.length < 2) await null;
    waiting[1](); // the newer answer comes first, or last
    if (!isOther) await second;
    waiting[0]();
    await Promise.all([first, second]);
    return { names: store.names, turns, listed: listed.at(-1) };
}"""


@pytest.mark.parametrize("is_other, name", [(True, "b.png"), (False, "ax.png")])
def test_a_list_that_is_overtaken_waits_for_the_newer_one(browser, server, is_other, name):
    with opened(browser, server.address) as page:
        page.wait_for_function("globalThis.Studio?.SetStore !== undefined")
        found = page.evaluate(LISTS, {"isOther": is_other})
        assert found["names"] == [name] and set(found["turns"]) == {name}
        assert found["listed"] == [name, True]  # what is another list for the first is so for the second, too


CHANGES = """async () => {
    const asked = [];
    const waiting = [];
    const server = {
        read_info: ({ id }) => ({ tag: id, undo: null, redo: null }),
        list_images: () => ({ names: [], cards: [] }),
        change: (request) => new Promise((done) => { asked.push(request); waiting.push(done); }),
    };
    let mayLeave = false;
    const failed = [];
    const hooks = { leave: () => mayLeave, listed: () => {}, state: () => {}, failed: (text) => failed.push(text) };
    const store = new Studio.SetStore(server, hooks);
    const until = async (count) => { while (waiting.length < count) await new Promise((go) => setTimeout(go, 1)); };
    const change = (request) => store.change("change", request);
    await store.open("a");
    const changes = [{ number: 1 }, () => ({ number: store.last.undo_id }), { number: 3 }, { number: 4 }].map(change);
    await until(1);
    waiting[0]({ undo_id: 2 });
    await until(2);
    await store.open("b").catch((error) => failed.push(error.message));
    const stays = store.id;
    mayLeave = true;
    await store.open("b");
    changes.push(change({ number: 5 })); // does not wait for those of the other one
    await until(3);
    waiting[1]({ error: "refused" });
    await until(4);
    waiting.slice(2).forEach((answer) => answer({}));
    await until(5);
    waiting[4]({});
    await Promise.all(changes);
    return { asked: asked.map(({ id, number }) => `${id}${number}`), stays, failed };
}"""


def test_changes_go_out_in_turn_and_to_the_data_set_that_was_open_when_they_were_made(browser, server):
    with opened(browser, server.address) as page:
        page.wait_for_function("globalThis.Studio?.SetStore !== undefined")
        found = page.evaluate(CHANGES)
        assert found["asked"] == ["a1", "a2", "b5", "a3", "a4"] and found["stays"] == "a"
        assert found["failed"] == ["A mask is not saved yet: look at the image that is open large.", "refused"]


SAVES = """async () => {
    let saved = { text: "before", version: "1" };
    const asked = [];
    const server = { save_caption: ({ text, version }) => {
        asked.push([text, version]);
        if (version !== saved.version) return { saved: false, conflict: saved };
        saved = { text, version: String(Number(version) + 1) };
        return { saved: true, version: saved.version };
    } };
    const lossy = { save_caption: (request) => { server.save_caption(request); return null; } }; // its answers are lost
    const conflicts = [];
    const hooks = { state: () => {}, changed: () => {}, conflict: (name) => conflicts.push(name), failed: () => {} };
    const store = new Studio.SetStore(lossy, hooks);
    store.cards.set("a.png", { caption: "before", version: "1" });
    store.edit("a.png", "one");
    await store.save("a.png");
    await store.save("a.png");
    const { unheard } = store.drafts.get("a.png");
    asked.length = 0;
    store.server = server;
    store.edit("a.png", "one, two");
    await store.save("a.png");
    saved = { text: "by another", version: "9" };
    store.edit("a.png", "three");
    await store.save("a.png");
    return { asked, conflicts, saved, unheard };
}"""


def test_a_caption_whose_answer_was_lost_is_typed_on_without_a_conflict_with_itself(browser, server):
    with opened(browser, server.address) as page:
        page.wait_for_function("globalThis.Studio?.SetStore !== undefined")
        page.route("**/config", lambda route: route.abort())
        found = page.evaluate(SAVES)
        assert found["unheard"] == ["one"]  # however often it was sent
        assert found["asked"] == [["one, two", "1"], ["one, two", "2"], ["three", "3"]]
        assert found["conflicts"] == ["a.png"] and found["saved"]["text"] == "by another"  # of another it is one
