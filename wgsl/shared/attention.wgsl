{# The body of three kernels. Each invocation has `each` rows of its own: queries where `kind` is "forward" or "query", keys where it is "key".
   It goes through the rows of the other kind, `block` at a time: scores first, then what they add to its sums.

   a·x is a score. b·y is the derivative by a probability, where there are gradients. The weights of y are probabilities, those of x the
   derivatives by scores. a, x and b, y are q, k and dy, v, or the other way round.

   Inside: own and other rows are clamped to the sample's last, columns of a head to its last. Statistics have 2·total elements in two rows of their
   stride, dots has total. What is stored belongs to a row below own_len; columns are those of the head, or, for the last head, the row's
   padding. k_tile, v_tile: t below tile·d. #}
{% set key = kind == "key" %}
{% set grad = kind != "forward" %}
{% set of_x = kind != "forward" %}
{% set of_y = kind != "query" %}
{% set own_len = k_len if key else q_len %}
{% set other_len = q_len if key else k_len %}
{% set keys = "q" if packed else "kv" %}
{% set a, a_first = (keys, k_first) if key else ("q", 0) %}
{% set b, b_first = (keys, v_first) if key else ("dy", 0) %}
{% set x, x_first = ("q", 0) if key else (keys, k_first) %}
{% set y, y_first = ("dy", 0) if key else (keys, v_first) %}
{% set lowest = "-3.4028234e38" %}
{% if tile > 0 %}
var<workgroup> x_tile: array<vec4<f32>, {{ tile * d }}>;
var<workgroup> y_tile: array<vec4<f32>, {{ tile * d }}>;
{% endif %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% include "shared/tile" %}
    let batch = wid.z;
    let head = wid.y{% if parts > 1 %} / {{ parts }}u{% endif %};
    let first = {% if parts > 1 %}wid.y % {{ parts }}u * {{ held }}u{% else %}0u{% endif %};
    let begin0 = wid.x * {{ size * each }}u;
    let column = head * {{ d }}u;
{% for r in range(each) %}
    let own{{ r }} = begin0 + {{ r * size }}u + lid;
    let row{{ r }} = batch * {{ own_len }}u + min(own{{ r }}, {{ own_len - 1 }}u);
    let a_at{{ r }} = row{{ r }} * {{ a }}_stride + {{ a_first }}u + column;
{% if grad %}
    let b_at{{ r }} = row{{ r }} * {{ b }}_stride + {{ b_first }}u + column;
{% endif %}
{% if not key %}
    let n{{ r }} = (batch * {{ heads }}u + head) * {{ q_len }}u + min(own{{ r }}, {{ q_len - 1 }}u);
{% endif %}
{% endfor %}
{# Own rows: in registers, or read again for every block. #}
{% if resident %}
{% for r in range(each) %}
{% for c in range(d) %}
    let a{{ r }}_{{ c }} = {{ a }}_load(a_at{{ r }} + {{ c }}u);
{% if grad %}
    let b{{ r }}_{{ c }} = {{ b }}_load(b_at{{ r }} + {{ c }}u);
{% endif %}
{% endfor %}
{% endfor %}
{% endif %}
{% for r in range(each) %}
{% if kind == "query" %}
    var dots{{ r }} = 0.0;
{% if resident %}
{% for c in range(d) %}
    dots{{ r }} += dot(b{{ r }}_{{ c }}, out_load(row{{ r }} * out_stride + column + {{ c }}u));
{% endfor %}
{% else %}
    for (var c = 0u; c < {{ d }}u; c++) {
        dots{{ r }} += dot({{ b }}_load(b_at{{ r }} + c), out_load(row{{ r }} * out_stride + column + c));
    }
{% endif %}
    let largest{{ r }} = stats_at(n{{ r }});
    let inverse{{ r }} = stats_at(stats_stride + n{{ r }});
{% elif kind == "forward" %}
    var largest{{ r }} = {{ lowest }};
    var sum{{ r }} = 0.0;
{% elif masked %}
    let counts{{ r }} = mask_at(row{{ r }}) != 0.0;
{% endif %}
{% for c in range(held) %}
{% if of_x %}
    var dx{{ r }}_{{ c }} = vec4<f32>();
{% endif %}
{% if of_y %}
    var dy{{ r }}_{{ c }} = vec4<f32>();
{% endif %}
{% endfor %}
{% endfor %}
{# Others that no own row of this workgroup sees are left out. #}
{% if causal and key %}
    let begin = begin0{% if tile > 0 %} / {{ tile }}u * {{ tile }}u{% else %} / {{ block }}u * {{ block }}u{% endif %};
    let end = {{ other_len }}u;
{% elif causal %}
    let begin = 0u;
    let end = min(begin0 + {{ size * each }}u, {{ other_len }}u);
{% else %}
    let begin = 0u;
    let end = {{ other_len }}u;
{% endif %}
{% if tile > 0 %}
    for (var other0 = begin; other0 < end; other0 += {{ tile }}u) {
        workgroupBarrier();
        for (var t = lid; t < {{ tile * d }}u; t += {{ size }}u) {
            let other = other0 + t / {{ d }}u;
            let other_row = batch * {{ other_len }}u + min(other, {{ other_len - 1 }}u);
            let at = column + t % {{ d }}u;
            let there = other < {{ other_len }}u{% if masked and not key %} && mask_at(other_row) != 0.0{% endif %};
            x_tile[t] = select(vec4<f32>(), {{ x }}_load(other_row * {{ x }}_stride + {{ x_first }}u + at), there);
            y_tile[t] = select(vec4<f32>(), {{ y }}_load(other_row * {{ y }}_stride + {{ y_first }}u + at), there);
        }
        workgroupBarrier();
        let stop = min(end - other0, {{ tile }}u);
        for (var place = 0u; place < stop; place += {{ block }}u) {
            let other = other0 + place;
{% else %}
    {
        for (var other = begin; other < end; other += {{ block }}u) {
{% endif %}
{% for i in range(block) %}
            let other{{ i }} = other + {{ i }}u;
            let other_row{{ i }} = batch * {{ other_len }}u + min(other{{ i }}, {{ other_len - 1 }}u);
            let there{{ i }} = other{{ i }} < {{ other_len }}u{% if masked and not key %} && mask_at(other_row{{ i }}) != 0.0{% endif %};
{% if key %}
            let n{{ i }} = (batch * {{ heads }}u + head) * {{ q_len }}u + min(other{{ i }}, {{ q_len - 1 }}u);
            let largest{{ i }} = stats_at(n{{ i }});
            let inverse{{ i }} = stats_at(stats_stride + n{{ i }});
            let dots{{ i }} = dots_at(n{{ i }});
{% endif %}
{% if tile > 0 %}
            let other_at{{ i }} = (place + {{ i }}u) * {{ d }}u;
{% else %}
            let x_at{{ i }} = other_row{{ i }} * {{ x }}_stride + {{ x_first }}u + column;
            let y_at{{ i }} = other_row{{ i }} * {{ y }}_stride + {{ y_first }}u + column;
{% endif %}
{% endfor %}
{% macro x_of(i, c) %}{% if tile > 0 %}x_tile[other_at{{ i }} + {{ c }}]{% else %}select(vec4<f32>(), {{ x }}_load(x_at{{ i }} + {{ c }}), there{{ i }}){% endif %}{% endmacro %}
{% macro y_of(i, c) %}{% if tile > 0 %}y_tile[other_at{{ i }} + {{ c }}]{% else %}select(vec4<f32>(), {{ y }}_load(y_at{{ i }} + {{ c }}), there{{ i }}){% endif %}{% endmacro %}
{# Scores, and derivatives by probabilities. #}
{% for r in range(each) %}
{% for i in range(block) %}
            var score{{ r }}_{{ i }} = 0.0;
{% if grad %}
            var by_p{{ r }}_{{ i }} = 0.0;
{% endif %}
{% endfor %}
{% endfor %}
{% if resident %}
{% for c in range(d) %}
            {
{% for i in range(block) %}
                let x{{ i }} = {{ x_of(i, c ~ "u") }};
{% if grad %}
                let y{{ i }} = {{ y_of(i, c ~ "u") }};
{% endif %}
{% for r in range(each) %}
                score{{ r }}_{{ i }} += dot(a{{ r }}_{{ c }}, x{{ i }});
{% if grad %}
                by_p{{ r }}_{{ i }} += dot(b{{ r }}_{{ c }}, y{{ i }});
{% endif %}
{% endfor %}
{% endfor %}
            }
{% endfor %}
{% else %}
            for (var c = 0u; c < {{ d }}u; c++) {
{% for r in range(each) %}
                let a{{ r }} = {{ a }}_load(a_at{{ r }} + c);
{% if grad %}
                let b{{ r }} = {{ b }}_load(b_at{{ r }} + c);
{% endif %}
{% endfor %}
{% for i in range(block) %}
                let x{{ i }} = {{ x_of(i, "c") }};
{% if grad %}
                let y{{ i }} = {{ y_of(i, "c") }};
{% endif %}
{% for r in range(each) %}
                score{{ r }}_{{ i }} += dot(a{{ r }}, x{{ i }});
{% if grad %}
                by_p{{ r }}_{{ i }} += dot(b{{ r }}, y{{ i }});
{% endif %}
{% endfor %}
{% endfor %}
            }
{% endif %}
{# Probabilities, in "forward" relative to the largest score so far. #}
{% for r in range(each) %}
{% for i in range(block) %}
            let seen{{ r }}_{{ i }} = there{{ i }}{% if causal %} && {% if key %}other{{ i }} >= own{{ r }}{% else %}other{{ i }} <= own{{ r }}{% endif %}{% endif %}{% if masked and key %} && counts{{ r }}{% endif %};
{% if grad %}
{% set n = i if key else r %}
            let p{{ r }}_{{ i }} = select(0.0, exp(score{{ r }}_{{ i }} * {{ scale }} - largest{{ n }}) * inverse{{ n }}, seen{{ r }}_{{ i }});
            let by_score{{ r }}_{{ i }} = p{{ r }}_{{ i }} * (by_p{{ r }}_{{ i }} - dots{{ n }});
{% else %}
            let scaled{{ r }}_{{ i }} = select({{ lowest }}, score{{ r }}_{{ i }} * {{ scale }}, seen{{ r }}_{{ i }});
{% endif %}
{% endfor %}
{% if not grad %}
            var top{{ r }} = largest{{ r }};
{% for i in range(block) %}
            top{{ r }} = max(top{{ r }}, scaled{{ r }}_{{ i }});
{% endfor %}
            let fade{{ r }} = exp(largest{{ r }} - top{{ r }});
            largest{{ r }} = top{{ r }};
            var part{{ r }} = 0.0;
{% for i in range(block) %}
            let p{{ r }}_{{ i }} = select(0.0, exp(scaled{{ r }}_{{ i }} - top{{ r }}), seen{{ r }}_{{ i }});
            part{{ r }} += p{{ r }}_{{ i }};
{% endfor %}
            sum{{ r }} = sum{{ r }} * fade{{ r }} + part{{ r }};
{% endif %}
{% endfor %}
{# What they add. #}
{% for c in range(held) %}
            {
                let c = {% if parts > 1 %}min(first + {{ c }}u, {{ d - 1 }}u){% else %}{{ c }}u{% endif %};
{% if not grad %}
{% for r in range(each) %}
                dy{{ r }}_{{ c }} *= fade{{ r }};
{% endfor %}
{% endif %}
{% for i in range(block) %}
{% if of_x %}
                let x{{ i }} = {{ x_of(i, "c") }};
{% endif %}
{% if of_y %}
                let y{{ i }} = {{ y_of(i, "c") }};
{% endif %}
{% for r in range(each) %}
{% if of_x %}
                dx{{ r }}_{{ c }} += by_score{{ r }}_{{ i }} * x{{ i }};
{% endif %}
{% if of_y %}
                dy{{ r }}_{{ c }} += p{{ r }}_{{ i }} * y{{ i }};
{% endif %}
{% endfor %}
{% endfor %}
            }
{% endfor %}
        }
    }
{% for r in range(each) %}
    if (own{{ r }} < {{ own_len }}u) {
{% if kind == "forward" %}
        let inverse = select(1.0 / sum{{ r }}, 0.0, sum{{ r }} == 0.0);
{% endif %}
{% for c in range(held) %}
{% if parts > 1 and (parts - 1) * held + c >= d %}
        if (first + {{ c }}u < {{ d }}u) {
{% else %}
        {
{% endif %}
            let at = column + first + {{ c }}u;
{% if kind == "forward" %}
            finish(row{{ r }}, at, dy{{ r }}_{{ c }} * inverse);
{% elif kind == "query" %}
            dq_store(row{{ r }} * dq_stride + at, dx{{ r }}_{{ c }} * {{ scale }});
{% else %}
            dkv_store(row{{ r }} * dkv_stride + {{ k_first }}u + at, {% if masked %}select(vec4<f32>(), dx{{ r }}_{{ c }} * {{ scale }}, counts{{ r }}){% else %}dx{{ r }}_{{ c }} * {{ scale }}{% endif %});
            dkv_store(row{{ r }} * dkv_stride + {{ v_first }}u + at, {% if masked %}select(vec4<f32>(), dy{{ r }}_{{ c }}, counts{{ r }}){% else %}dy{{ r }}_{{ c }}{% endif %});
{% endif %}
        }
{% endfor %}
{# Once per row of a head: what is not of columns. Once per row: its padding. #}
        if (first == 0u) {
{% if kind == "forward" %}
            stats_put(n{{ r }}, select(largest{{ r }}, 0.0, sum{{ r }} == 0.0));
            stats_put(stats_stride + n{{ r }}, inverse);
            if (n{{ r }} == {{ total - 1 }}u) {
                for (var i = {{ total }}u; i < stats_stride; i++) {
                    stats_put(i, 0.0);
                    stats_put(stats_stride + i, 0.0);
                }
            }
{% elif kind == "query" %}
            dots_put(n{{ r }}, dots{{ r }});
            if (n{{ r }} == {{ total - 1 }}u) {
                for (var i = {{ total }}u; i < dots_stride; i++) {
                    dots_put(i, 0.0);
                }
            }
{% endif %}
            if (head == {{ heads - 1 }}u) {
{% if kind == "forward" %}
                for (var i = {{ heads * d }}u; i < {{ width }}u; i++) {
                    finish(row{{ r }}, i, vec4<f32>());
                }
{% elif key or not packed %}
{% set out, columns = ("dkv", v_first + heads * d) if key else ("dq", heads * d) %}
                for (var i = {{ columns }}u; i < {{ out }}_stride; i++) {
                    {{ out }}_store(row{{ r }} * {{ out }}_stride + i, vec4<f32>());
                }
{% endif %}
            }
        }
    }
{% endfor %}
}
