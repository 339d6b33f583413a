//! Every series that tollgate exposes, declared once: a field each, its comment is the help text.
//!
//! Labels are bounded: routes, codes and upstreams are few by nature; models are bounded by [`ModelLabels`], because a
//! client could otherwise make a new series with every request. Nothing here ever holds a key, a prompt or a user.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use foldhash::quality::RandomState;
use once_cell::sync::Lazy;
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use tollgate_core::{allowance::Report, denial::Denial, usage::Usage};

/// Buckets for whole requests, in seconds: from a cached embedding to a long reasoning stream.
const REQUEST_BUCKETS: &[f64] = &[0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
/// Buckets for what the gateway itself adds, in seconds.
const OVERHEAD_BUCKETS: &[f64] =
    &[0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25];

/// The registry and its series.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Requests by route, model and outcome ("ok" or the error code).
    pub requests_total: IntCounterVec,
    /// Time from the arrival of a request to the end of its answer, in seconds.
    pub request_duration_seconds: HistogramVec,
    /// The part of it before the upstream was asked, without waiting for the client, in seconds.
    pub overhead_seconds: Histogram,
    /// Time from the arrival of a request to the first byte of a streamed answer, in seconds.
    pub time_to_first_token_seconds: Histogram,
    /// Tokens by model and kind (prompt, completion; and of these cached, `cache_write`, reasoning, audio, image).
    pub tokens_total: IntCounterVec,
    /// Requests that were answered by models of which no price is known, and so cost nothing in the books.
    pub unpriced_requests_total: IntCounterVec,
    /// Requests that the gateway itself turned down, by code.
    pub denials_total: IntCounterVec,
    /// Attempts by upstream and outcome ("ok" or what went wrong).
    pub upstream_requests_total: IntCounterVec,
    /// Attempts under way, by upstream.
    pub upstream_in_flight: IntGaugeVec,
    /// Where each upstream stands: 1 for the state it is in, 0 for the others.
    pub upstream_state: IntGaugeVec,
    /// Changes of state, by upstream and the state that was entered.
    pub upstream_transitions_total: IntCounterVec,
    /// Time from the beginning of an attempt to the head of its answer, by upstream, in seconds.
    pub upstream_response_seconds: HistogramVec,
    /// Time from the beginning of an attempt to the first byte of a stream, by upstream, in seconds.
    pub upstream_first_token_seconds: HistogramVec,
    /// What an upstream said was left of its own limits, by kind (requests, tokens).
    pub upstream_remaining: IntGaugeVec,
    /// Attempts beyond the first of a request.
    pub retries_total: IntCounter,
    /// Retries that were not made because the traffic did not pay for them.
    pub retries_refused_total: IntCounter,
    /// Usage records that are not in the database yet.
    pub journal_pending_records: IntGauge,
    /// Bytes of the journal on the disk.
    pub journal_bytes: IntGauge,
    /// Usage records that were lost because the journal had no room for them.
    pub journal_lost_records_total: IntCounter,
    /// Bytes of the journal that were damaged and left out.
    pub journal_corrupt_bytes_total: IntCounter,
    /// Requests whose content was not kept because there was no room for it, or no database.
    pub content_dropped_total: IntCounter,
    /// Bytes of content in memory.
    pub content_bytes: IntGauge,
    /// Time to write one batch of usage records to the database, in seconds.
    pub usage_flush_seconds: Histogram,
    /// Ought limits to be shared through Redis, and are not: 1 or 0.
    pub limiter_degraded: IntGauge,
    /// Sums of quotas that were corrected to what the database has, by place (memory, redis).
    pub quota_corrections_total: IntCounterVec,
    /// Is the database reachable: 1 or 0.
    pub store_up: IntGauge,
    /// Rows that were deleted because they were old, by table.
    pub retention_rows_deleted_total: IntCounterVec,
    /// Partitions, each a month of rows, that were dropped because they were old, by table.
    pub retention_partitions_dropped_total: IntCounterVec,
    /// Generation of the configuration in use.
    pub config_generation: IntGauge,
    /// Time until a certificate of the TLS listener expires, by domain, in seconds.
    pub certificate_expiry_seconds: IntGaugeVec,
    models: ModelLabels,
}

struct Declare<'a>(&'a Registry);

impl Declare<'_> {
    fn register<C: prometheus::core::Collector + Clone + 'static>(
        &self,
        made: prometheus::Result<C>,
    ) -> prometheus::Result<C> {
        let collector = made?;
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn opts(name: &str, help: &str) -> Opts {
        Opts::new(name, help).namespace("tollgate")
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.register(IntCounter::with_opts(Self::opts(name, help)))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
        self.register(IntCounterVec::new(Self::opts(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.register(IntGauge::with_opts(Self::opts(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
        self.register(IntGaugeVec::new(Self::opts(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
        let opts = HistogramOpts { common_opts: Self::opts(name, help), buckets: buckets.to_vec() };
        self.register(Histogram::with_opts(opts))
    }

    fn histograms(&self, name: &str, help: &str, buckets: &[f64], labels: &[&str]) -> prometheus::Result<HistogramVec> {
        let opts = HistogramOpts { common_opts: Self::opts(name, help), buckets: buckets.to_vec() };
        self.register(HistogramVec::new(opts, labels))
    }
}

impl Metrics {
    /// Registers every series.
    ///
    /// # Errors
    /// If two series share a name: a defect that the first start shows.
    pub fn try_new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let declare = Declare(&registry);
        Ok(Self {
            requests_total: declare.counters(
                "requests_total",
                "Requests by route, model and outcome (ok or the error code)",
                &["route", "model", "code"],
            )?,
            request_duration_seconds: declare.histograms(
                "request_duration_seconds",
                "Time from the arrival of a request to the end of its answer",
                REQUEST_BUCKETS,
                &["route"],
            )?,
            overhead_seconds: declare.histogram(
                "overhead_seconds",
                "Time that the gateway itself took before it asked the upstream",
                OVERHEAD_BUCKETS,
            )?,
            time_to_first_token_seconds: declare.histogram(
                "time_to_first_token_seconds",
                "Time from the arrival of a request to the first byte of a streamed answer",
                REQUEST_BUCKETS,
            )?,
            tokens_total: declare.counters("tokens_total", "Tokens by model and kind", &["model", "kind"])?,
            unpriced_requests_total: declare.counters(
                "unpriced_requests_total",
                "Requests answered by models without a price, which cost nothing in the books",
                &["model"],
            )?,
            denials_total: declare.counters("denials_total", "Requests that the gateway turned down", &["code"])?,
            upstream_requests_total: declare.counters(
                "upstream_requests_total",
                "Attempts by upstream and outcome",
                &["upstream", "outcome"],
            )?,
            upstream_in_flight: declare.gauges("upstream_in_flight", "Attempts under way", &["upstream"])?,
            upstream_state: declare.gauges(
                "upstream_state",
                "Where each upstream stands: 1 for the state it is in, 0 for the others",
                &["upstream", "state"],
            )?,
            upstream_transitions_total: declare.counters(
                "upstream_transitions_total",
                "Changes of state, by upstream and the state that was entered",
                &["upstream", "state"],
            )?,
            upstream_response_seconds: declare.histograms(
                "upstream_response_seconds",
                "Time from the beginning of an attempt to the head of its answer",
                REQUEST_BUCKETS,
                &["upstream"],
            )?,
            upstream_first_token_seconds: declare.histograms(
                "upstream_first_token_seconds",
                "Time from the beginning of an attempt to the first byte of a stream",
                REQUEST_BUCKETS,
                &["upstream"],
            )?,
            upstream_remaining: declare.gauges(
                "upstream_remaining",
                "What an upstream said was left of its own limits, by kind",
                &["upstream", "kind"],
            )?,
            retries_refused_total: declare.counter(
                "retries_refused_total",
                "Retries that were not made because the traffic did not pay for them",
            )?,
            retries_total: declare.counter("retries_total", "Attempts beyond the first of a request")?,
            journal_pending_records: declare
                .gauge("journal_pending_records", "Usage records that are not in the database yet")?,
            journal_bytes: declare.gauge("journal_bytes", "Bytes of the journal on the disk")?,
            journal_lost_records_total: declare
                .counter("journal_lost_records_total", "Usage records lost because the journal had no room for them")?,
            journal_corrupt_bytes_total: declare
                .counter("journal_corrupt_bytes_total", "Bytes of the journal that were damaged and left out")?,
            content_dropped_total: declare.counter(
                "content_dropped_total",
                "Requests whose content was not kept because there was no room for it, or no database",
            )?,
            content_bytes: declare.gauge("content_bytes", "Bytes of content in memory")?,
            usage_flush_seconds: declare.histogram(
                "usage_flush_seconds",
                "Time to write one batch of usage records to the database",
                REQUEST_BUCKETS,
            )?,
            limiter_degraded: declare
                .gauge("limiter_degraded", "Ought limits to be shared through Redis, and are not: 1 or 0")?,
            quota_corrections_total: declare.counters(
                "quota_corrections_total",
                "Sums of quotas that were corrected to what the database has, by place (memory, redis)",
                &["place"],
            )?,
            store_up: declare.gauge("store_up", "Is the database reachable: 1 or 0")?,
            retention_rows_deleted_total: declare.counters(
                "retention_rows_deleted_total",
                "Rows that were deleted because they were old, by table",
                &["table"],
            )?,
            retention_partitions_dropped_total: declare.counters(
                "retention_partitions_dropped_total",
                "Partitions, each a month of rows, that were dropped because they were old, by table",
                &["table"],
            )?,
            config_generation: declare.gauge("config_generation", "Generation of the configuration in use")?,
            certificate_expiry_seconds: declare.gauges(
                "certificate_expiry_seconds",
                "Time until a certificate of the TLS listener expires",
                &["domain"],
            )?,
            models: ModelLabels::default(),
            registry,
        })
    }

    /// Counts a finished request.
    pub fn request(&self, route: &'static str, model: &str, code: &str, duration: Duration) {
        self.requests_total.with_label_values(&[route, model, code]).inc();
        self.request_duration_seconds.with_label_values(&[route]).observe(duration.as_secs_f64());
    }

    /// Counts a denial.
    pub fn denial(&self, denial: &Denial) {
        self.denials_total.with_label_values(&[denial.code()]).inc();
    }

    /// Notes what an upstream said was left of its own limits.
    pub fn upstream_remaining(&self, upstream: &str, report: &Report) {
        for (kind, said) in [("requests", report.requests), ("tokens", report.tokens)] {
            if let Some(remaining) = said.remaining {
                let gauge = self.upstream_remaining.with_label_values(&[upstream, kind]);
                gauge.set(i64::try_from(remaining).unwrap_or(i64::MAX));
            }
        }
    }

    /// Counts the tokens of an answer.
    pub fn tokens(&self, model: &str, usage: &Usage) {
        let kinds = [
            ("prompt", usage.prompt_tokens),
            ("completion", usage.completion_tokens),
            ("cached", usage.cached_tokens),
            ("cache_write", usage.cache_write_tokens),
            ("reasoning", usage.reasoning_tokens),
            ("audio", usage.audio_tokens),
            ("image", usage.image_tokens),
        ];
        for (kind, count) in kinds.into_iter().filter(|(_, count)| *count > 0) {
            self.tokens_total.with_label_values(&[model, kind]).inc_by(count);
        }
    }

    /// The label for `model`; see [`ModelLabels`].
    #[must_use]
    pub fn model_label(&self, model: &str, answered: bool) -> Arc<str> {
        self.models.label(model, answered)
    }

    /// All series in Prometheus' text format.
    ///
    /// # Errors
    /// If the encoder fails, which it does only on inconsistent series.
    pub fn encode(&self) -> prometheus::Result<Vec<u8>> {
        let mut text = Vec::with_capacity(16 * 1024);
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

/// Which models have a label of their own.
///
/// A model earns its label with its first successful answer, so that only names that a provider knows become series; at
/// most [`ModelLabels::CAP`] do. Everything else is counted under `other`.
#[derive(Debug, Default)]
struct ModelLabels {
    known: papaya::HashMap<Arc<str>, (), RandomState>,
    count: AtomicUsize,
}

static OTHER: Lazy<Arc<str>> = Lazy::new(|| Arc::from("other"));

impl ModelLabels {
    const CAP: usize = 256;

    fn label(&self, model: &str, answered: bool) -> Arc<str> {
        let known = self.known.pin();
        if let Some((label, ())) = known.get_key_value(model) {
            return Arc::clone(label);
        }
        if !answered || self.count.fetch_add(1, Ordering::Relaxed) >= Self::CAP {
            return Arc::clone(&OTHER);
        }
        let label: Arc<str> = Arc::from(model);
        known.insert(Arc::clone(&label), ());
        label
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_earns_its_label_by_an_answer_and_labels_are_capped() {
        let metrics = Metrics::try_new().unwrap();
        assert_eq!(&*metrics.model_label("nonsense", false), "other");
        assert_eq!(&*metrics.model_label("gpt-4o", true), "gpt-4o");
        assert_eq!(&*metrics.model_label("gpt-4o", false), "gpt-4o");
        for n in 0..ModelLabels::CAP * 2 {
            let label = metrics.model_label(&format!("m{n}"), true);
            assert_eq!(&*label == "other", n >= ModelLabels::CAP - 1);
        }
        assert_eq!(&*metrics.model_label("late", true), "other");
        assert_eq!(metrics.models.known.len(), ModelLabels::CAP);
    }

    #[test]
    fn series_carry_the_promised_names() {
        let metrics = Metrics::try_new().unwrap();
        metrics.request("embeddings", "m", "ok", Duration::from_millis(3));
        metrics.tokens("m", &Usage { prompt_tokens: 3, ..Usage::default() });
        let text = String::from_utf8(metrics.encode().unwrap()).unwrap();
        assert!(text.contains(r#"tollgate_requests_total{code="ok",model="m",route="embeddings"} 1"#), "{text}");
        assert!(text.contains(r#"tollgate_tokens_total{kind="prompt",model="m"} 3"#), "{text}");
        assert!(!text.contains("kind=\"reasoning\""), "{text}");
    }
}
