"""Generated events: tracks and showers in two drift volumes, seen by three planes of wires.

The detector is a box. x is the drift, with the cathode at x = 0 and an anode at either end; y is
up; z is along the beam. With the detector's H rows and W columns, in units of the pitches:

    row       = H / 2 + x / ROW_CM + t0     for x < 0, kept where 0 <= row < H / 2
    row       = H / 2 + x / ROW_CM - t0     for x >= 0, kept where H / 2 <= row < H
    column[p] = W / 2 + (z cos a[p] + y sin a[p]) / WIRE_CM,     a = +60, -60, 0 degrees

with z from the middle of the box. t0, in rows, is when a particle came, relative to the beam: 0
for the neutrino's, random for cosmic ones, which therefore look displaced towards the anode or
the cathode, break at the cathode and end at the edge of the readout window.

One event is one flat table of particles, one flat table of their steps and one scatter of the
steps onto the planes: no loop runs over particles' steps.
"""

from collections.abc import Callable
from os import PathLike
from typing import NamedTuple

import numpy as np

from .dataset import FILE_SIZE, PLANES, SIZE, Event, EventDataset, Pixels
from .writer import EventWriter

ROW_CM = 0.3125  # drift distance between rows
WIRE_CM = 0.3  # distance between wires
ANGLES = np.radians([60.0, -60.0, 0.0])  # of the planes' wires to the vertical
THRESHOLD = 5.0  # smallest charge that the readout keeps
STEP_CM = 0.1

_ACTIVE = (1984 / 2048, 1984 / 2048, 1664 / 2048)  # share of the columns with a wire, by plane
_GAIN = np.array([0.9, 0.9, 1.0])  # induction planes see a little less
_CHARGE_PER_MEV = 240.0
_SMEAR = 1.2  # electronics noise where there is a signal
_SHAPING_ROWS = 0.62
_DIFFUSION_ROWS = 0.35  # at the cathode; it grows with the root of the drift
_DIFFUSION_WIRES = 0.5
_TAPS = np.arange(-3, 4)  # rows that a step reaches
_TRUTH_ROWS = 1.15  # rows that a step is the truth of
_RADIATION_CM = 14.0
_COSMICS = 9.5  # mean number in a full-size event


class _Particles(NamedTuple):
    """What a number of particles need to be stepped; arrays [n] or [n, 3]."""

    start: np.ndarray  # cm
    direction: np.ndarray  # need not be of length one
    length: np.ndarray  # cm
    left: np.ndarray  # residual range at the last step, cm: zero where it stops
    rise: np.ndarray  # dE/dx = max(floor, rise * range ** power), MeV/cm
    power: np.ndarray
    floor: np.ndarray
    cosmic: np.ndarray  # bool
    t0: np.ndarray  # rows


_MUON, _PROTON, _ELECTRON = (8.0, -0.37, 1.8), (17.0, -0.42, 1.9), (0.0, -0.5, 2.0)


def _particles(start, direction, length, kind, cosmic, t0=0.0, left=0.0) -> _Particles:
    """Return particles of one kind; every argument is for all or one for each."""
    length = np.atleast_1d(np.asarray(length, np.float64))
    number = len(length)
    each = [np.broadcast_to(np.asarray(a, np.float64), (number,)) for a in (left, *kind)]
    return _Particles(
        np.broadcast_to(start, (number, 3)),
        np.broadcast_to(direction, (number, 3)),
        length,
        *each,
        np.broadcast_to(np.asarray(cosmic, bool), (number,)),
        np.broadcast_to(np.asarray(t0, np.float64), (number,)),
    )


def _directions(rng: np.random.Generator, number: int) -> np.ndarray:
    return rng.standard_normal((number, 3))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.sqrt(np.einsum("ni,ni->n", vectors, vectors) + 1e-30)[:, None]


class _Detector:
    """Lengths of a detector with some rows and columns; the box scales with them."""

    def __init__(self, size: tuple[int, int]):
        self.rows, self.columns = size
        wires = [round(share * self.columns) for share in _ACTIVE]
        self.margins = [(self.columns - n) // 2 for n in wires]
        self.wires = wires
        z = wires[2] * WIRE_CM / 2
        y = (wires[0] * WIRE_CM / 2 - z * np.cos(ANGLES[0])) / np.sin(ANGLES[0])
        self.half = np.array([self.rows * ROW_CM / 2, y, z])  # half the box in x, y, z, cm
        # An area's worth of pixels is crossed by tracks in proportion to its width.
        self.scale = float(np.sqrt(self.rows * self.columns / (FILE_SIZE[0] * FILE_SIZE[1])))


def _shower(rng, start, direction, energy, cosmic, t0) -> _Particles:
    """Return the electrons of a shower of some MeV: a cone of branches, and dots around it."""
    direction = _unit(np.asarray(direction)[None])[0]
    branches = max(1, int(energy / 11.0))
    dots = rng.poisson(energy / 16.0)
    number = branches + dots
    # Longitudinal gamma profile; the first branches form the trunk.
    depth = rng.gamma(1.2 + 0.35 * np.log1p(energy / 30.0), 0.9 * _RADIATION_CM, number)
    depth[: min(3, branches)] *= 0.1
    angle = np.where(np.arange(number) < branches, 0.05, 0.3)[:, None]
    spread = rng.standard_normal((number, 3))
    spread *= rng.gamma(1.5, 0.8, (number, 1)) * angle
    ray = direction + spread
    length = np.empty(number)
    length[:branches] = np.clip(rng.exponential(4.0, branches), 0.5, 25.0)
    length[branches:] = rng.exponential(0.35, dots) + 0.1
    heading = ray + spread + rng.standard_normal((number, 3)) * (0.1 + angle)
    return _particles(start + ray * depth[:, None], heading, length, _ELECTRON, cosmic, t0)


def _cosmics(rng: np.random.Generator, detector: _Detector) -> list[_Particles]:
    """Return muons that cross the box or stop in it, their knock-on electrons and showers."""
    number = rng.poisson(_COSMICS * max(detector.scale, 0.15))
    if not number:
        return []
    half = detector.half
    # The flux through the horizontal goes with cos^3 of the zenith angle; lines that miss go.
    tries = 40 * number
    reach = 2 * half[1]
    start = rng.uniform(-1, 1, (tries, 3)) * (half + np.array([reach, 0, reach]))
    start[:, 1] = half[1]
    cosine = rng.random(tries) ** 0.25
    sine, azimuth = np.sqrt(1 - cosine**2), rng.uniform(0, 2 * np.pi, tries)
    heading = np.stack((sine * np.cos(azimuth), -cosine, sine * np.sin(azimuth)), axis=1)
    heading[np.abs(heading) < 1e-9] = 1e-9
    near, far = (-half - start) / heading, (half - start) / heading
    enter = np.maximum(np.minimum(near, far).max(axis=1), 0.0)
    leave = np.maximum(near, far).min(axis=1)
    hits = np.flatnonzero(leave - enter > 1.0)[:number]
    start, heading = start[hits] + enter[hits, None] * heading[hits], heading[hits]
    length = (leave - enter)[hits]
    number = len(hits)
    t0 = rng.uniform(-0.5, 0.5, number) * detector.rows

    stops = rng.random(number) < 0.15
    length = np.where(stops, length * rng.uniform(0.2, 0.95, number), length)
    left = np.where(stops, 0.0, rng.exponential(2500.0, number) + 100.0)
    parts = [_particles(start, heading, length, _MUON, True, t0, left)]

    decays = np.flatnonzero(stops & (rng.random(number) < 0.8))
    if len(decays):  # to electrons of up to 53 MeV
        end = start[decays] + heading[decays] * length[decays, None]
        reach = rng.uniform(2.0, 20.0, len(decays))
        ways = _directions(rng, len(decays))
        parts.append(_particles(end, ways, reach, _ELECTRON, True, t0[decays]))

    knocked = rng.poisson(0.04 * length)
    whose = np.repeat(np.arange(number), knocked)
    if len(whose):
        at = start[whose] + heading[whose] * (rng.random(len(whose)) * length[whose])[:, None]
        ways = _unit(_directions(rng, len(whose))) + 1.5 * heading[whose]
        reach = np.minimum(rng.pareto(1.6, len(whose)) * 0.5 + 0.2, 20.0)
        parts.append(_particles(at, ways, reach, _ELECTRON, True, t0[whose]))

    for k in np.flatnonzero(rng.random(number) < 0.1):  # bremsstrahlung
        at = start[k] + heading[k] * length[k] * rng.uniform(0.1, 0.9)
        parts.append(_shower(rng, at, heading[k], rng.uniform(60, 600), True, t0[k]))
    return parts


def _forward(rng: np.random.Generator, number: int, spread: float) -> np.ndarray:
    return _unit(np.array([0.0, 0.0, 1.0]) + spread * rng.standard_normal((number, 3)))


def _neutrino(rng: np.random.Generator, detector: _Detector) -> list[_Particles]:
    """Return what leaves one vertex: muon or electron, protons, pions, photons, neutrons' dots."""
    vertex = rng.uniform(-0.9, 0.9, 3) * detector.half
    flavour = rng.choice(3, p=(0.6, 0.2, 0.2))  # muon, electron, neither
    parts = []
    if flavour == 0:
        way = _forward(rng, 1, 0.5)
        parts.append(_particles(vertex, way, rng.exponential(140.0) + 5.0, _MUON, False))
    elif flavour == 1:
        way = _forward(rng, 1, 0.4)[0]
        parts.append(_shower(rng, vertex, way, rng.gamma(3.0, 280.0) + 80.0, False, 0.0))
    protons, pions = rng.poisson(1.6), rng.poisson(0.6)
    if protons:
        lengths = rng.exponential(9.0, protons) + 1.0
        parts.append(_particles(vertex, _forward(rng, protons, 1.0), lengths, _PROTON, False))
    if pions:  # often absorbed before they stop
        lengths, left = rng.exponential(35.0, pions) + 3.0, rng.exponential(15.0, pions)
        ways = _forward(rng, pions, 0.9)
        parts.append(_particles(vertex, ways, lengths, _MUON, False, 0.0, left))
    photons = 2 * rng.poisson(0.35 if flavour < 2 else 0.8)
    for way in _forward(rng, photons, 0.8):  # each converts somewhere on its way
        at = vertex + way * rng.exponential(18.0)
        parts.append(_shower(rng, at, way, rng.gamma(1.6, 140.0) + 30.0, False, 0.0))
    dots = rng.poisson(12)
    if dots:
        at = vertex + _unit(_directions(rng, dots)) * rng.exponential(40.0, (dots, 1))
        lengths = rng.exponential(0.5, dots) + 0.1
        parts.append(_particles(at, _directions(rng, dots), lengths, _ELECTRON, False))
    return parts


def _steps(rng: np.random.Generator, particles: _Particles):
    """Return positions [n, 3] in cm, charge [n], and the particle [n] of every step."""
    counts = np.maximum(np.ceil(particles.length / STEP_CM).astype(np.int64), 1)
    whose = np.repeat(np.arange(len(counts)), counts)
    begin = np.cumsum(counts) - counts
    k = np.arange(len(whose)) - begin[whose]
    # Residual range, hence kinetic energy, hence multiple scattering and dE/dx.
    left = (counts[whose] - k - 0.5) * STEP_CM + particles.left[whose]
    rise, power, floor = (a[whose] for a in (particles.rise, particles.power, particles.floor))
    steep = rise * left**power
    energy = floor * left + steep * left / (1 + power)
    momentum = np.where(rise > 0, 2.0, 1.0) * energy  # times beta, MeV: electrons have one T
    kick = 13.6 * np.sqrt(STEP_CM / _RADIATION_CM) / (momentum + 1.0)

    def running(values: np.ndarray) -> np.ndarray:
        """Return the sum of a particle's values up to and with each step."""
        total = np.cumsum(values, axis=0)
        before = total[begin] - values[begin]
        return total - before[whose]

    bend = rng.standard_normal((len(whose), 3), np.float32) * kick[:, None]
    direction = _unit(_unit(particles.direction)[whose] + running(bend))
    position = particles.start[whose] + running(direction * STEP_CM)

    deposit = np.maximum(floor, steep)
    # Landau-like: Moyal deviates are minus the logarithm of a squared normal one.
    moyal = -2 * np.log(np.abs(rng.standard_normal(len(whose), np.float32)) + 1e-4)
    deposit = deposit * np.maximum(1 + 0.13 * (moyal - 0.7), 0.2) * STEP_CM
    recombined = 0.8 / (1 + 0.07 * deposit / STEP_CM)
    return position, deposit * recombined * _CHARGE_PER_MEV, whose


def _noise(rng: np.random.Generator, detector: _Detector):
    """Return flat pixels [n] (plane, column, row) and charge [n] of noise above threshold.

    One half of each induction plane, a different one for either, is loud and has its noise in
    bursts along a wire; elsewhere there are single pixels.
    """
    rows, columns = detector.rows, detector.columns
    half = rows // 2
    flat = []
    for plane in range(PLANES):
        margin, wires = detector.margins[plane], detector.wires[plane]
        quiet = rng.poisson((0.00018 if plane == 2 else 0.00077) * wires * rows)
        column = rng.integers(margin, margin + wires, quiet)
        flat.append((plane * columns + column) * rows + rng.integers(0, rows, quiet))
        if plane == 2:
            continue
        low, high = (half, rows) if plane == 0 else (0, half)
        bursts = rng.poisson(0.0043 * wires * (high - low))
        column = rng.integers(margin, margin + wires, bursts)
        row = rng.integers(low, high, bursts)
        member = np.repeat(np.arange(bursts), rng.geometric(0.42, bursts))
        offset = np.rint(rng.laplace(0.0, 4.0, len(member))).astype(np.int64)
        adjacent = (member[1:] == member[:-1]) & (rng.random(len(member)) < 0.45)[1:]
        offset[1:][adjacent] = 1
        row = row[member] + offset
        inside = (row >= low) & (row < high)
        flat.append(((plane * columns + column[member]) * rows + row)[inside])
    flat = np.concatenate(flat)
    return flat, THRESHOLD + rng.exponential(0.78, len(flat)).astype(np.float32)


def _readout(rng: np.random.Generator, detector: _Detector, parts: list[_Particles]):
    """Return flat pixels (plane, column, row), ascending, with charge and label; all [n]."""
    rows, columns = detector.rows, detector.columns
    half = rows // 2
    # In the file's order, column by column, so that a step writes to neighbours in memory.
    charge = np.zeros(PLANES * columns * rows, np.float32)
    truth = np.zeros_like(charge)  # neutrino's charge minus cosmic charge
    if parts:
        particles = _Particles(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        position, amount, whose = _steps(rng, particles)
        inside = (np.abs(position) < detector.half).all(axis=1)
        (x, y, z), amount, whose = position[inside].T, amount[inside], whose[inside]
        t0, cosmic = particles.t0[whose], particles.cosmic[whose]
        upper = x < 0
        drifted = np.sqrt(1 - np.abs(x) / detector.half[0])  # of the root of the longest drift
        time = half + x / ROW_CM + np.where(upper, t0, -t0)
        kept = np.where(upper, (time >= 0) & (time < half), (time >= half) & (time < rows))
        y, z, time, amount, drifted, cosmic, upper = (
            a[kept] for a in (y, z, time, amount, drifted, cosmic, upper)
        )
        nearest = np.floor(time).astype(np.int64)
        away = _TAPS + (nearest + 0.5 - time)[:, None]  # [n, taps], in rows
        width = np.sqrt(_SHAPING_ROWS**2 + (_DIFFUSION_ROWS * drifted) ** 2)
        shape = np.exp(-0.5 * (away / width[:, None]) ** 2).astype(np.float32)
        shape *= (amount / shape.sum(axis=1))[:, None].astype(np.float32)
        row = nearest[:, None] + _TAPS
        low = np.where(upper, 0, half)[:, None]
        seen = (row >= low) & (row < low + half)
        core = np.abs(away) < _TRUTH_ROWS
        sign = np.where(cosmic, np.float32(-1), np.float32(1))[:, None]
        for plane in range(PLANES):
            wire = (z * np.cos(ANGLES[plane]) + y * np.sin(ANGLES[plane])) / WIRE_CM + columns / 2
            wire += rng.standard_normal(len(wire), np.float32) * (_DIFFUSION_WIRES * drifted)
            margin = detector.margins[plane]
            column = np.clip(np.floor(wire).astype(np.int64), margin, columns - margin - 1)
            flat = (plane * columns + column)[:, None] * rows + row
            here = shape * np.float32(_GAIN[plane])
            np.add.at(charge, flat[seen], here[seen])
            both = seen & core
            np.add.at(truth, flat[both], (here * sign)[both])
    signal = np.flatnonzero(charge > THRESHOLD - 3 * _SMEAR)
    charge[signal] += _SMEAR * rng.standard_normal(len(signal), np.float32)
    flat, noise = _noise(rng, detector)
    charge[flat] = np.maximum(charge[flat], noise)
    flat = np.flatnonzero(charge >= THRESHOLD)
    share = truth[flat]
    label = (share != 0).astype(np.uint8) + (share > 0)
    return flat, charge[flat], label


def _generate(seed: int, index: int, size: tuple[int, int], neutrino_fraction: float) -> Pixels:
    rng = np.random.default_rng(np.random.SeedSequence((seed, index)))
    detector = _Detector(size)
    parts = _cosmics(rng, detector)
    if rng.random() < neutrino_fraction:
        parts += _neutrino(rng, detector)
    flat, charge, label = _readout(rng, detector, parts)
    column, row = np.divmod(flat, size[0])
    plane, column = np.divmod(column, size[1])
    return Pixels(plane, row, column, charge, label, (seed, 0, index))


class SyntheticEvents(EventDataset):
    """A map-style data set of generated events, each a function of seed and index alone.

    Args:
        count: Number of events.
        seed: Non-negative integer; other seeds give other events.
        size: Rows and columns of the images. They are the detector's, except that (1260, 2048)
            is cut, as with a file, from a detector of 1280 rows. A smaller detector is a smaller
            box with as dense, but shorter, tracks; rows must be even.
        neutrino_fraction: Share of the events with a neutrino; the others have none.
        **options: `charge`, `labels`, `clip`, `log_unit` and `flip_seed`, see `EventDataset`.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        count: int,
        seed: int = 0,
        size: tuple[int, int] = SIZE,
        *,
        neutrino_fraction: float = 0.9,
        **options,
    ):
        """Take the arguments, which the class describes; nothing is generated yet."""
        super().__init__(size=size, **options)
        if count < 0 or seed < 0:
            raise ValueError(f"count, seed: want non-negative integers, got {count}, {seed}")
        if not 0 <= neutrino_fraction <= 1:
            raise ValueError(f"neutrino_fraction: want 0 to 1, got {neutrino_fraction}")
        self.count, self.seed, self.neutrino_fraction = count, seed, neutrino_fraction
        self.detector = FILE_SIZE if self.size == SIZE else self.size
        if self.detector[0] % 2 or min(self.detector) < 32:
            raise ValueError(f"size: want an even number of rows and 32 x 32 or more, got {size}")

    def __len__(self) -> int:
        """Return the number of events."""
        return self.count

    def pixels(self, index: int) -> Pixels:
        """Return the occupied pixels of one event of the whole detector; id (seed, 0, index)."""
        return _generate(self.seed, index, self.detector, self.neutrino_fraction)


def generate_event(seed: int, index: int, size: tuple[int, int] = SIZE, **options) -> Event:
    """Return event index of `SyntheticEvents(index + 1, seed, size, **options)`."""
    return SyntheticEvents(index + 1, seed, size, **options)[index]


def generate_file(
    path: str | PathLike,
    events: int,
    seed: int = 0,
    size: tuple[int, int] = FILE_SIZE,
    *,
    neutrino_fraction: float = 0.9,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write generated events to a file that `EventFile` reads; the file appears when complete.

    Args:
        path: The file to write.
        events: How many.
        seed: As in `SyntheticEvents`, whose events these are, pixel for pixel.
        size: Rows and columns of the detector, 1280 x 2048 as in real files.
        neutrino_fraction: Share of the events with a neutrino.
        overwrite: Whether to replace a file at path.
        progress: Called with (written, events) after each event.

    Raises:
        FileExistsError: There is such a file, and overwrite is False.
        ValueError: An argument is out of its range.
    """
    source = SyntheticEvents(events, seed, size, neutrino_fraction=neutrino_fraction)
    source.detector = source.size  # the file has all rows that it is asked for
    with EventWriter(path, overwrite=overwrite) as writer:
        for index in range(events):
            writer.write_pixels(source.pixels(index), source.size)
            if progress is not None:
                progress(index + 1, events)
