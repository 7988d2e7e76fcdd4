"""Leases under fire: held against a plain model, with processes that die, clocks that jump and databases that are shared."""
import itertools, os, random, subprocess, sys, threading, time
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule, run_state_machine_as_test

import fsml_lab.lease
from fsml_lab.core import FsmlError, Lab
from fsml_lab.lease import LeaseQueue, _PICK
from lease_worker import LOG
from servers import postgresql

HERE, S = Path(__file__).parent, 1_000_000  # µs in a second


@pytest.fixture(params=["sqlite", "postgresql"])
def lab(request, tmp_path):
    lab = Lab(tmp_path/"lab", durability="normal", database=postgresql.database() if request.param == "postgresql" else None)
    yield lab
    lab.engine.dispose()


# ---- a model of the queue in plain Python ----

class Item:
    def __init__(self, order, priority, need, not_before):
        self.order, self.priority, self.need, self.not_before = order, priority, need, not_before
        self.done, self.failed, self.aside = 0, 0, False
        self.loans, self.late, self.had = {}, {}, set()  # owner -> (token, expires); owner -> token of a lapsed loan; owners that may not have it


class Model:
    "What the queue should do, without a database: a dictionary and the rules in words."
    def __init__(self, lease_us, max_attempts): self.items, self.now, self.lease_us, self.max, self.n = {}, 0, lease_us, max_attempts, itertools.count()

    def find(self, lease):
        "The item of this lease if it is current or lapsed, and which of the two."
        i = self.items.get(lease.item_id)
        if i and i.loans.get(lease.owner, (None,))[0] == lease.token: return i, "current"
        if i and i.late.get(lease.owner) == lease.token: return i, "lapsed"
        return i, None

    def lapse(self):
        for i in self.items.values():
            for o in [o for o, (_, e) in i.loans.items() if e <= self.now]:
                i.late[o] = i.loans.pop(o)[0]
                i.failed += 1
            self.check(i)

    def check(self, i):
        if i.done < i.need and i.failed >= self.max: i.aside = True

    def free(self, i): return i.done + len(i.loans) < i.need

    def claim(self, owner, n, tokens):
        self.lapse()
        can = [(k, i) for k, i in self.items.items() if not i.aside and self.free(i) and i.not_before <= self.now and owner not in i.had and owner not in i.loans]
        out = sorted(can, key=lambda ki: (-ki[1].priority, ki[1].order))[:n]
        lent = []
        for (k, i), token in zip(out, tokens):
            i.loans[owner] = (i.late.pop(owner, token), self.now + self.lease_us)
            lent.append((k, i.loans[owner], i.failed + len(i.loans)))
        return [k for k, _ in out], lent

    def submit(self, lease):
        i, how = self.find(lease)
        if how is None or how == "lapsed" and not self.free(i): return False
        if how == "current": del i.loans[lease.owner]
        else:
            del i.late[lease.owner]
            i.failed -= 1  # it was not in vain after all
        i.done += 1
        if i.done < i.need: i.had.add(lease.owner)
        else: i.late, i.aside = {}, False
        return True

    def renew(self, lease):
        i, how = self.find(lease)
        if how is None or how == "lapsed" and not self.free(i): return False
        if how == "lapsed":
            del i.late[lease.owner]
            i.failed -= 1
        i.loans[lease.owner] = (lease.token, self.now + self.lease_us)
        return True

    def end(self, lease, how, again=True, not_before=0):
        i, state = self.find(lease)
        if state is None or state == "lapsed" and again: return False
        if state == "current": del i.loans[lease.owner]
        else: del i.late[lease.owner]
        if not again: i.had.add(lease.owner)
        if state == "current" and how != "release": i.failed += 1
        if how == "give_up": i.aside = True
        else: i.not_before = not_before
        self.check(i)
        return True

    def reopen(self, k, priority):
        if not (i := self.items.get(k)): return 0
        i.had = set()
        if i.done >= i.need: i.need, i.failed = i.done + 1, 0
        elif i.aside: i.aside, i.failed = False, 0
        else:
            i.priority = priority
            return 1
        i.not_before, i.priority = 0, priority
        return 1

    def counts(self):
        self.lapse()
        n = Counter("done" if i.done >= i.need else "set_aside" if i.aside else "open" if self.free(i) else "leased" for i in self.items.values())
        return {k: n[k] for k in ("open", "leased", "done", "set_aside")}


ids, owners, delays = st.sampled_from("abcdefgh"), st.sampled_from(["ada", "ben", "cy"]), st.sampled_from([0, 0, 0, 5 * S])


class Against(RuleBasedStateMachine):
    "Any sequence of calls gives what the model gives."
    lab, queues = None, itertools.count()
    leases = Bundle("leases")

    @initialize(max_attempts=st.integers(1, 3))
    def open(self, max_attempts):
        self.m = Model(10 * S, max_attempts)
        self.q = LeaseQueue(self.lab, f"queue {next(self.queues)}", lease_s=10, max_attempts=max_attempts, clock=lambda: self.m.now)
        self.submitted = Counter()

    @rule(k=ids, priority=st.sampled_from([0, 0, 1, -.5]), need=st.sampled_from([1, 1, 2, 3]), delay=delays)
    def put(self, k, priority, need, delay):
        new = k not in self.m.items
        at = self.m.now + delay if delay else 0
        assert self.q.put([k, k], priority=priority, need=need, not_before=at, payload={"id": k}) == new
        if new: self.m.items[k] = Item(next(self.m.n), priority, need, at)
        assert self.q.payload(k) == {"id": k}

    @rule(target=leases, owner=owners, n=st.integers(1, 4))
    def claim(self, owner, n):
        leases = self.q.claim(owner, n)
        ids, lent = self.m.claim(owner, n, [x.token for x in leases])
        assert [x.item_id for x in leases] == ids
        assert [(x.item_id, (x.token, x.expires), x.attempts) for x in leases] == lent
        return multiple(*leases)

    @rule(lease=leases)
    def submit(self, lease):
        ok = self.q.submit(lease)
        assert ok == self.m.submit(lease)
        self.submitted[lease.item_id] += ok

    @rule(lease=consumes(leases))
    def submit_twice(self, lease):
        first = self.q.submit(lease)
        assert first == self.m.submit(lease)
        assert not self.q.submit(lease) and not self.m.submit(lease)
        self.submitted[lease.item_id] += first

    @rule(lease=leases, undone=st.booleans())
    def submit_with(self, lease, undone):
        try:
            with self.lab.write() as conn:
                ok = self.q.submit(lease, conn)
                if undone: raise ZeroDivisionError
        except ZeroDivisionError: return
        assert ok == self.m.submit(lease)
        self.submitted[lease.item_id] += ok

    @rule(target=leases, lease=leases)
    def renew(self, lease):
        if self.m.renew(lease):
            new = self.q.renew(lease)
            assert new.token == lease.token and new.expires == self.m.now + 10 * S
            return new
        with pytest.raises(FsmlError, match="This lease is over"): self.q.renew(lease)
        return multiple()

    @rule(lease=leases, again=st.booleans(), delay=delays)
    def release(self, lease, again, delay):
        at = self.m.now + delay if delay else 0
        assert self.q.release(lease, again=again, not_before=at) == self.m.end(lease, "release", again, at)

    @rule(lease=leases, delay=delays)
    def fail(self, lease, delay):
        at = self.m.now + delay if delay else 0
        assert self.q.fail(lease, "no luck", not_before=at) == self.m.end(lease, "fail", not_before=at)

    @rule(lease=leases)
    def give_up(self, lease): assert self.q.give_up(lease, "hopeless") == self.m.end(lease, "give_up")

    @rule(seconds=st.sampled_from([1, 5, 10, 11]))
    def wait(self, seconds): self.m.now += seconds * S

    @rule(k=ids, priority=st.sampled_from([0, 2]))
    def reopen(self, k, priority): assert self.q.reopen([k], priority=priority) == self.m.reopen(k, priority)

    @rule(k=ids)
    def remove(self, k):
        assert self.q.remove([k]) == (k in self.m.items)
        self.m.items.pop(k, None)
        del self.submitted[k]

    @invariant()
    def same(self):
        if not hasattr(self, "q"): return
        assert self.q.counts() == self.m.counts()
        assert set(self.q.set_aside()) == {k for k, i in self.m.items.items() if i.aside and i.done < i.need}
        for o in ("ada", "ben", "cy"):
            held = self.q.held(o)
            assert [x.item_id for x in held] == [k for k, i in sorted(self.m.items.items(), key=lambda ki: (-ki[1].priority, ki[1].order)) if o in i.loans]
        with self.lab.read() as conn:  # whatever the model says: never more submissions and leases than were wanted
            for k, need, done, leased in conn.execute(sa.text("select item_id, need, done, leased from lease_item where queue = :q"), dict(q=self.q.name)):
                assert done == self.submitted[k] and 0 <= leased and done + leased <= need


@pytest.mark.parametrize("lab, examples", [("sqlite", 40), ("postgresql", 6)], indirect=["lab"])
def test_the_queue_does_what_its_model_does(lab, examples):
    machine = type("Here", (Against,), dict(lab=lab))
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)))


# ---- processes ----

def test_nothing_lost_and_nothing_double_when_a_worker_is_killed(lab):
    q = LeaseQueue(lab, "items", max_attempts=None)
    q.put(f"once {i}" for i in range(150))
    q.put((f"twice {i}" for i in range(25)), need=2)
    command = lambda owner, *more: [sys.executable, HERE/"lease_worker.py", lab.home, lab.settings.database, "items", owner, "2", *more]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    victim = subprocess.Popen(command("victim", "slow"), env=env, stdout=subprocess.PIPE, text=True)
    assert victim.stdout.readline() == "holding\n"
    held = {x.item_id for x in q.held("victim")}
    others = [subprocess.Popen(command(f"worker {k}"), env=env, stderr=subprocess.PIPE, text=True) for k in range(3)]
    while q.counts()["done"] < 20 and any(p.poll() is None for p in others): time.sleep(.01)  # they are at it
    victim.kill()  # SIGKILL
    victim.communicate()
    for p in others: assert p.wait(60) == 0, p.stderr.read()
    for p in others: p.stderr.close()
    with lab.read() as conn: log = conn.execute(sa.select(LOG)).all()
    assert len(held) == 3                                                                                # it died with leases in its hands
    assert q.counts() == dict(open=0, leased=0, done=175, set_aside=0)
    assert Counter(r.item_id for r in log) == {f"once {i}": 1 for i in range(150)} | {f"twice {i}": 2 for i in range(25)}
    assert len(set(log)) == len(log)                                                                     # two votes come from two owners
    assert Counter(r.owner for r in log)["victim"] == 2                                                  # what it had submitted stays


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_works_beside_its_parent(lab):
    q = LeaseQueue(lab, "items")
    q.put(map(str, range(40)))
    mine = [q.claim("parent")[0]]
    r, w = os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            os.write(w, " ".join(x.item_id for _ in range(15) for x in q.claim("child")).encode())
            code = 0
        finally: os._exit(code)
    mine += [q.claim("parent")[0] for _ in range(15)]
    assert os.waitpid(pid, 0)[1] == 0
    theirs = os.read(r, 1000).decode().split()
    os.close(r)
    os.close(w)
    assert len(theirs) == 15 and len({*theirs, *(x.item_id for x in mine)}) == 31
    assert all(q.submit(x) for x in mine) and q.counts()["leased"] == 15


def test_one_owner_in_several_kernels_and_leases_that_run_out_all_the_time(lab):
    "Threads with few owners' names claim, submit, renew and release at random while leases last 20 ms: no deadlock, no item submitted too often."
    q = LeaseQueue(lab, "items", lease_s=.02, max_attempts=None)
    q.put(map(str, range(40)), need=2)
    wins, errors = [], []
    def work(seed):
        rng, old, end = random.Random(seed), [], time.monotonic() + 20
        try:
            while q.counts()["done"] < 40 and time.monotonic() < end:
                old += q.claim(rng.choice(["ada", "ben", "cy"]), 3)
                for _ in range(min(2, len(old))):
                    x, do = old.pop(rng.randrange(len(old))), rng.random()
                    if do < .7: wins.extend([(x.item_id, x.owner)] * q.submit(x))
                    elif do < .8: q.release(x)
                    elif do < .9:
                        try: old.append(q.renew(x))
                        except FsmlError: pass
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors
    assert q.counts()["done"] == 40 and len(set(wins)) == len(wins) and Counter(i for i, _ in wins) == {str(i): 2 for i in range(40)}


# ---- time ----

def test_a_lease_is_not_over_before_its_owner_gets_it(lab):
    "The clock is read after the wait for the lock."
    q = LeaseQueue(lab, "items", lease_s=.2)
    q.put("a")
    ready = threading.Event()
    def block():
        with lab.write() as conn:
            conn.execute(sa.text("update lease_item set priority = priority"))
            ready.set()
            time.sleep(.4)
    t = threading.Thread(target=block)
    t.start()
    ready.wait()
    while not (got := q.claim("ada")): time.sleep(.01)  # PostgreSQL skips the locked item, SQLite waits
    t.join()
    assert got[0].expires > fsml_lab.lease.now_us() and q.held("ada") == got


def test_with_postgresql_the_servers_clock_counts(tmp_path, monkeypatch):
    lab = Lab(tmp_path/"lab", database=postgresql.database())
    q = LeaseQueue(lab, "items", lease_s=60)
    q.put("a")
    monkeypatch.setattr(fsml_lab.lease, "now_us", lambda: 0)  # this machine believes it is 1970
    assert abs(q.claim("ada")[0].expires - (time.time() + 60) * S) < 30 * S
    assert q.claim("ben") == [] and len(q.held("ada")) == 1
    lab.engine.dispose()


def test_a_clock_that_goes_back_lends_nothing_twice(lab):
    now = [1000 * S]
    q = LeaseQueue(lab, "items", lease_s=10, clock=lambda: now[0])
    q.put("ab")
    a = q.claim("ada")[0]
    now[0] -= 500 * S
    b = q.claim("ben", 5)
    assert [x.item_id for x in b] == ["b"]
    assert q.submit(a) and q.submit(b[0]) and q.counts()["done"] == 2


def test_work_that_took_too_long_counts_while_nobody_else_has_it(lab):
    now = [0]
    q = LeaseQueue(lab, "items", lease_s=10, clock=lambda: now[0])
    q.put("ab")
    a, b = q.claim("ada", 2)
    now[0] += 20 * S
    ben = q.claim("ben")[0]
    assert ben.item_id == "a"
    assert not q.submit(a)            # Ben has it
    assert q.submit(b)                # nobody has it
    assert q.release(ben)
    assert q.submit(a)                # Ben gave it back: welcome after all
    assert not q.submit(ben) and q.counts()["done"] == 2


def test_an_outbox_of_last_night_is_still_good(lab):
    "Who claims again after the lease ran out gets the item back under the same token."
    now = [0]
    q = LeaseQueue(lab, "items", lease_s=10, clock=lambda: now[0])
    q.put("ab")
    night = q.claim("ada")[0]
    now[0] += 8 * 3600 * S
    morning = q.claim("ada")[0]
    assert (morning.item_id, morning.token) == (night.item_id, night.token) and morning.expires > now[0]
    assert q.submit(night) and not q.submit(morning)


# ---- size ----

def test_a_claim_costs_the_same_with_many_items(tmp_path):
    "Counted in steps of SQLite's virtual machine, which no other process disturbs."
    steps = {}
    for n in (200, 6_000):
        lab = Lab(tmp_path/str(n), durability="normal")
        q = LeaseQueue(lab, "items")
        q.put((str(i) for i in range(n)), priority=0)
        q.put((f"later {i}" for i in range(n)), not_before=2**60)
        for x in q.claim("ada", n//10): q.submit(x)
        count = [0]
        with lab.write() as conn:  # the pool has one connection, which the claim uses, too
            conn.connection.dbapi_connection.set_progress_handler(lambda: count.__setitem__(0, count[0] + 1), 10)
        q.submit(q.claim("ada")[0])
        steps[n] = count[0]
        lab.engine.dispose()
    assert steps[200] > 5 and steps[6_000] < 1.3 * steps[200]


def test_postgresql_claims_by_the_index(tmp_path):
    lab = Lab(tmp_path/"lab", database=postgresql.database())
    q = LeaseQueue(lab, "items")
    q.put(map(str, range(5000)))
    with lab.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn: conn.exec_driver_sql("VACUUM ANALYZE")
    with lab.read() as conn:
        sql = str(_PICK.params(q="items", who="ada", n=1).compile(lab.engine, compile_kwargs=dict(literal_binds=True)))
        plan = "\n".join(conn.exec_driver_sql("EXPLAIN " + sql.replace("%", "%%")).scalars())
    lab.engine.dispose()
    assert "lease_item_claim" in plan and "Sort" not in plan and "Seq Scan on lease_item" not in plan, plan


# ---- what is refused ----

@pytest.mark.parametrize("bad", ["", "a\0b", "\ud800", 7, None])
def test_ids_that_a_database_cannot_hold_are_refused_and_nothing_is_put(lab, bad):
    q = LeaseQueue(lab, "items")
    with pytest.raises(FsmlError, match="must be text"): q.put(["good", bad])
    with pytest.raises(FsmlError, match="must be text"): q.claim(bad)
    assert q.counts()["open"] == 0


def test_hostile_names_are_names(lab):
    q = LeaseQueue(lab, "'; drop table lease_item; --")
    names = ["<script>alert(1)</script>", "a'b\"c", "../../etc/passwd", "ünï😀", "%s %(x)s :x"]
    q.put(names)
    assert [x.item_id for x in q.claim("<b>ada</b>", 9)] == names
    assert "<script" not in q._repr_html_()


@pytest.mark.parametrize("how", [dict(lease_s=0), dict(lease_s=float("nan")), dict(max_attempts=0)])
def test_impossible_queues_are_refused(lab, how):
    with pytest.raises(FsmlError): LeaseQueue(lab, "items", **how)
