"""A small live chart: the loss of every step, and the scores of the validations."""

from __future__ import annotations

import math

from qtpy.QtCore import QPointF, QRectF, QSize, Qt
from qtpy.QtGui import QColor, QPainter, QPainterPath, QPalette, QPen
from qtpy.QtWidgets import QSizePolicy, QWidget

Points = list[tuple[float, float]]

# Distinguishable in the common kinds of colour blindness (Okabe and Ito 2008), on dark and on light.
LOSS, SCORE = QColor(86, 180, 233), QColor(230, 159, 0)


class Chart(QWidget):
    """Draws the raw loss (thin), the smoothed loss (thick; logarithmic scale), and scores from 0 to 1 (points)."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.losses: Points = []
        self.scores: Points = []
        self.score_name = ""
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Expanding)
        self.setMinimumHeight(150)

    def sizeHint(self) -> QSize:
        """Qt's."""
        return QSize(320, 190)

    def show_curves(self, losses: Points, scores: Points, score_name: str) -> None:
        """Draw these curves."""
        self.losses, self.scores, self.score_name = losses, scores, score_name
        self.update()

    def paintEvent(self, _event: object) -> None:
        """Qt's."""
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        text = self.palette().color(QPalette.ColorRole.WindowText)
        area = QRectF(self.rect()).adjusted(46, 24, -34 if self.scores else -10, -22)
        faint = QColor(text)
        faint.setAlpha(60)
        if not self.losses:
            painter.setPen(text)
            painter.drawText(self.rect(), Qt.AlignmentFlag.AlignCenter, "The loss appears here.")
            return
        low, high = loss_range(self.losses)
        last = max(self.losses[-1][0], 1e-9)
        for value in ticks(low, high):
            y = place(value, low, high, area)
            painter.setPen(QPen(faint, 1))
            painter.drawLine(QPointF(area.left(), y), QPointF(area.right(), y))
            painter.setPen(text)
            box = QRectF(0, y - 9, area.left() - 5, 18)
            painter.drawText(
                box, int(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter), f"{value:g}"
            )
        thin = QColor(LOSS)
        thin.setAlpha(110)
        for points, pen in ((self.losses, QPen(thin, 1)), (smooth(self.losses), QPen(LOSS, 2))):
            painter.setPen(pen)
            painter.drawPath(_path([(x / last, place(y, low, high, area)) for x, y in thinned(points)], area))
        self._draw_scores(painter, area, last, text)
        painter.setPen(text)
        below = QRectF(area.left(), area.bottom() + 2, area.width(), 18)
        painter.drawText(below, int(Qt.AlignmentFlag.AlignRight), f"{last:.3g} epochs")
        painter.setPen(LOSS)
        painter.drawText(QRectF(4, 2, area.width(), 18), int(Qt.AlignmentFlag.AlignLeft), "loss")

    def _draw_scores(self, painter: QPainter, area: QRectF, last: float, text: QColor) -> None:
        if not self.scores:
            return
        painter.setPen(text)
        for value in (0, 0.5, 1):
            y = area.bottom() - value * area.height()
            box = QRectF(area.right() + 5, y - 9, 29, 18)
            painter.drawText(
                box, int(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter), f"{value:g}"
            )
        shown = [
            (x / last, area.bottom() - min(max(y, 0.0), 1.0) * area.height()) for x, y in thinned(self.scores)
        ]
        painter.setPen(QPen(SCORE, 2))
        painter.drawPath(_path(shown, area))
        painter.setBrush(SCORE)
        for x, y in shown:
            painter.drawEllipse(QPointF(area.left() + x * area.width(), y), 2.5, 2.5)
        label = f"{self.score_name} {self.scores[-1][1]:.3f}"
        box = QRectF(area.left(), 2, self.width() - area.left() - 6, 18)
        painter.drawText(box, int(Qt.AlignmentFlag.AlignRight), label)


def _path(points: Points, area: QRectF) -> QPainterPath:
    path = QPainterPath()
    for number, (x, y) in enumerate(points):
        at = QPointF(area.left() + x * area.width(), y)
        if number:
            path.lineTo(at)
        else:
            path.moveTo(at)
    return path


def loss_range(losses: Points) -> tuple[float, float]:
    """Return the lowest and highest loss to show; for a logarithmic scale both are above 0 if all losses are."""
    values = [value for _, value in losses]
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(high), 1e-9):
        return low - max(abs(low), 1e-3) * 0.1, high + max(abs(high), 1e-3) * 0.1
    return low, high


def place(value: float, low: float, high: float, area: QRectF) -> float:
    """Return the position of a value in pixels from the top: logarithmic if all values are above 0."""
    if low > 0:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return area.bottom() - (value - low) / (high - low) * area.height()


def ticks(low: float, high: float) -> list[float]:
    """Return up to six round numbers from `low` to `high`: 1, 2 and 5 times powers of ten, or more if few fit."""
    least = math.floor(math.log10(max(high - low if low <= 0 else low, 1e-12))) - 1
    most = math.ceil(math.log10(max(abs(high), abs(low), 1e-12)))
    inside: list[float] = []
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        known = [digit * 10.0**power for power in range(least, most + 1) for digit in digits]
        known += [0.0, *(-value for value in known)]
        inside = sorted(value for value in known if low <= value <= high)
        if len(inside) >= 3:
            break
    while len(inside) > 6:
        inside = inside[::2]
    return inside or [float(f"{low:.2g}"), float(f"{high:.2g}")]


def smooth(points: Points, share: float = 0.05) -> Points:
    """Return an exponential moving average over about `share` of the points, unbiased at its start."""
    keep = 1 - 1 / max(1.0, share * len(points))
    total = weight = 0.0
    result = []
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        result.append((x, total / weight))
    return result


def thinned(points: Points, most: int = 2000) -> Points:
    """Return at most `most` of the points, including the last one."""
    if len(points) <= most:
        return points
    step = -(-len(points) // most)
    return points[:-1][::step] + points[-1:]
