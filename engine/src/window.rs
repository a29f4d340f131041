//! Tumbling and hopping windows, the panes they share, and when they close.

use crate::event::{Micros, Span};

/// How event time is cut. Windows are half open, `[start, end)`, and aligned to the Unix epoch in UTC.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Window {
    /// Fixed, back to back: every instant is in one window.
    Tumble { size: Span },
    /// Starts every `slide` and lasts `size`: an instant is in `size / slide` windows.
    Hop { slide: Span, size: Span },
}

/// Why a window cannot be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WindowError {
    #[error("a window's {0} must be longer than zero")]
    NotPositive(&'static str),
    #[error(
        "slide {slide} µs is longer than size {size} µs: events between two windows would be in none; make slide at most size"
    )]
    Gaps { slide: i64, size: i64 },
    #[error(
        "size {size} µs and slide {slide} µs need {panes} panes a window, more than {max}; use a slide that divides size evenly or a longer one"
    )]
    TooManyPanes { size: i64, slide: i64, panes: i64, max: i64 },
}

/// The most panes one window may be made of; bounds the work of a slide.
pub const MAX_PANES: i64 = 100_000;

impl Window {
    /// A tumbling window of `size`.
    pub fn tumble(size: Span) -> Result<Window, WindowError> {
        if size <= Span::ZERO {
            return Err(WindowError::NotPositive("size"));
        }
        Ok(Window::Tumble { size })
    }

    /// A hopping window; `size` need not be a multiple of `slide`.
    pub fn hop(slide: Span, size: Span) -> Result<Window, WindowError> {
        if slide <= Span::ZERO {
            return Err(WindowError::NotPositive("slide"));
        }
        if size <= Span::ZERO {
            return Err(WindowError::NotPositive("size"));
        }
        if slide > size {
            return Err(WindowError::Gaps { slide: slide.0, size: size.0 });
        }
        let panes = size.0 / gcd(slide.0, size.0);
        if panes > MAX_PANES {
            return Err(WindowError::TooManyPanes { size: size.0, slide: slide.0, panes, max: MAX_PANES });
        }
        Ok(Window::Hop { slide, size })
    }

    /// How long a window lasts.
    pub fn size(self) -> Span {
        match self {
            Window::Tumble { size } | Window::Hop { size, .. } => size,
        }
    }

    /// Time from one window's start to the next one's.
    pub fn slide(self) -> Span {
        match self {
            Window::Tumble { size } => size,
            Window::Hop { slide, .. } => slide,
        }
    }

    /// Width of the panes that windows are put together from: the greatest common divisor of slide and size.
    pub fn pane(self) -> Span {
        Span(gcd(self.slide().0, self.size().0))
    }

    /// End of the first window that holds `at`.
    pub fn first_end(self, at: Micros) -> Micros {
        let size = self.size();
        // the first start s, a multiple of slide, with s + size > at
        let start = at.minus(size).pane_start(self.slide()).plus(self.slide());
        start.plus(size)
    }

    /// End of the last window that holds `at`.
    pub fn last_end(self, at: Micros) -> Micros {
        at.pane_start(self.slide()).plus(self.size())
    }
}

fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instant_on_a_boundary_opens_a_window_and_is_not_in_the_one_that_ends() {
        let minute = Window::tumble(Span(60)).unwrap();
        assert_eq!((minute.first_end(Micros(60)), minute.last_end(Micros(60))), (Micros(120), Micros(120)));
        let hop = Window::hop(Span(10), Span(30)).unwrap();
        assert_eq!((hop.first_end(Micros(30)), hop.last_end(Micros(30))), (Micros(40), Micros(60)));
        assert_eq!((hop.first_end(Micros(-1)), hop.last_end(Micros(-1))), (Micros(0), Micros(20)));
    }

    #[test]
    fn a_size_that_is_no_multiple_of_slide_works_by_smaller_panes() {
        let hop = Window::hop(Span(20), Span(50)).unwrap();
        assert_eq!(hop.pane(), Span(10));
        // windows [-40,10) [-20,30) [0,50) hold 5
        assert_eq!((hop.first_end(Micros(5)), hop.last_end(Micros(5))), (Micros(10), Micros(50)));
    }

    #[test]
    fn windows_that_make_no_sense_are_refused() {
        assert_eq!(Window::tumble(Span(0)), Err(WindowError::NotPositive("size")));
        assert!(matches!(Window::hop(Span(2), Span(1)), Err(WindowError::Gaps { .. })));
        assert!(matches!(Window::hop(Span(1), Span(1_000_003)), Err(WindowError::TooManyPanes { .. })));
    }
}
