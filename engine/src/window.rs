//! Tumbling, hopping, cumulating and session windows, the panes they share, and when they close.

use crate::event::{Micros, Span};

/// How event time is cut. Windows are aligned to the Unix epoch in UTC and half open, `[start, end)`, but for sessions,
/// which follow the events of a key: an event exactly at a session's end still belongs to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Window {
    /// Fixed, back to back: every instant is in one window.
    Tumble { size: Span },
    /// Starts every `slide` and lasts `size`: an instant is in `size / slide` windows.
    Hop { slide: Span, size: Span },
    /// Grows by `step` up to `size`, then starts over: windows that start together and end a step apart.
    Cumulate { step: Span, size: Span },
    /// The events of one key with no more than `gap` between them; ends `gap` after the last.
    Session { gap: Span },
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
    #[error("size {size} µs is no multiple of step {step} µs; make it one")]
    Uneven { step: i64, size: i64 },
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

    /// A cumulating window; `size` must be a multiple of `step`.
    pub fn cumulate(step: Span, size: Span) -> Result<Window, WindowError> {
        if step <= Span::ZERO {
            return Err(WindowError::NotPositive("step"));
        }
        if size <= Span::ZERO {
            return Err(WindowError::NotPositive("size"));
        }
        if size.0 % step.0 != 0 {
            return Err(WindowError::Uneven { step: step.0, size: size.0 });
        }
        let panes = size.0 / step.0;
        if panes > MAX_PANES {
            return Err(WindowError::TooManyPanes { size: size.0, slide: step.0, panes, max: MAX_PANES });
        }
        Ok(Window::Cumulate { step, size })
    }

    /// A session window.
    pub fn session(gap: Span) -> Result<Window, WindowError> {
        if gap <= Span::ZERO {
            return Err(WindowError::NotPositive("gap"));
        }
        Ok(Window::Session { gap })
    }

    /// How long a window lasts at most; a session, at least.
    pub fn size(self) -> Span {
        match self {
            Window::Tumble { size } | Window::Hop { size, .. } | Window::Cumulate { size, .. } => size,
            Window::Session { gap } => gap,
        }
    }

    /// Time from one window's end to the next one's; of sessions, the least there can be.
    pub fn slide(self) -> Span {
        match self {
            Window::Tumble { size } => size,
            Window::Hop { slide, .. } => slide,
            Window::Cumulate { step, .. } => step,
            Window::Session { gap } => gap,
        }
    }

    /// How many windows an instant is in at most: those that share the state of its pane.
    pub fn overlap(self) -> i64 {
        (self.size().0 + self.slide().0 - 1) / self.slide().0
    }

    /// Width of the panes that windows are put together from: the greatest common divisor of slide and size.
    /// Sessions have no panes.
    pub fn pane(self) -> Span {
        Span(gcd(self.slide().0, self.size().0))
    }

    /// Start of the window that ends at `end`; the latest that a session with this end can have.
    pub fn start(self, end: Micros) -> Micros {
        match self {
            Window::Cumulate { size, .. } => end.minus(Span(1)).pane_start(size),
            _ => end.minus(self.size()),
        }
    }

    /// End of the first window that holds `at`; of a session, the end it would have with this event alone.
    pub fn first_end(self, at: Micros) -> Micros {
        match self {
            Window::Tumble { .. } | Window::Hop { .. } => {
                let size = self.size();
                // the first start s, a multiple of slide, with s + size > at
                let start = at.minus(size).pane_start(self.slide()).plus(self.slide());
                start.plus(size)
            }
            Window::Cumulate { step, .. } => at.pane_start(step).plus(step),
            Window::Session { gap } => at.plus(gap),
        }
    }

    /// End of the last window that holds `at`.
    pub fn last_end(self, at: Micros) -> Micros {
        match self {
            Window::Tumble { .. } | Window::Hop { .. } => at.pane_start(self.slide()).plus(self.size()),
            Window::Cumulate { size, .. } => at.pane_start(size).plus(size),
            Window::Session { gap } => at.plus(gap),
        }
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
        assert_eq!((minute.overlap(), hop.overlap()), (1, 3));
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
        assert_eq!(Window::cumulate(Span(2), Span(5)), Err(WindowError::Uneven { step: 2, size: 5 }));
        assert!(matches!(Window::cumulate(Span(1), Span(1_000_000)), Err(WindowError::TooManyPanes { .. })));
        assert_eq!(Window::session(Span(0)), Err(WindowError::NotPositive("gap")));
    }

    #[test]
    fn a_cumulating_window_grows_from_a_common_start_and_starts_over() {
        let window = Window::cumulate(Span(10), Span(30)).unwrap();
        assert_eq!((window.first_end(Micros(-1)), window.last_end(Micros(-1))), (Micros(0), Micros(0)));
        assert_eq!((window.first_end(Micros(0)), window.last_end(Micros(0))), (Micros(10), Micros(30)));
        assert_eq!(
            (window.start(Micros(10)), window.start(Micros(30)), window.start(Micros(40))),
            (Micros(0), Micros(0), Micros(30))
        );
    }
}
